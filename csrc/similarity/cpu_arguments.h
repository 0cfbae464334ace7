// Checks of arguments that memory safety needs, for CPU and GPU, and kinds from their names.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <string>

#include "common/checks.h"
#include "similarity/problem.h"

namespace sapwood::similarity {

inline Kind parse_kind(const char* op, const std::string& name) {
  if (name == "cosine") return Kind::cosine;
  if (name == "correlation") return Kind::correlation;
  if (name == "dot") return Kind::dot;
  STD_TORCH_CHECK(name == "euclidean", "sapwood.", op,
                  ": kind must be one of cosine, correlation, dot, euclidean, got ", name);
  return Kind::euclidean;
}

inline Kind parse_unit_kind(const char* op, const std::string& name) {
  STD_TORCH_CHECK(name == "cosine" || name == "correlation", "sapwood.", op,
                  ": kind must be one of cosine, correlation, got ", name);
  return name == "cosine" ? Kind::cosine : Kind::correlation;
}

inline void check_rows(const char* op, const char* argument, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  check_dim(op, argument, t, 2);
  const ScalarType type = t.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Double ||
                        type == ScalarType::Half || type == ScalarType::BFloat16;
  check_dtype(op, argument, t, floating, "float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(t.size(0) <= std::numeric_limits<int32_t>::max(), "sapwood.", op, ": ", argument,
                  " must have fewer than 2^31 rows, got ", t.size(0));
}

inline void check_candidates(const char* op, const torch::stable::Tensor& y,
                             const torch::stable::Tensor& x) {
  check_rows(op, "y", y);
  check_shape(op, "y", y, {y.size(0), x.size(1)});
  check_dtype(op, "y", y, y.scalar_type() == x.scalar_type(), "of x's dtype");
}

// Whether products may be taken in bfloat16.
inline bool parse_precision(const char* op, const std::string& name, bool recheck) {
  STD_TORCH_CHECK(name == "fp32" || name == "bf16", "sapwood.", op,
                  ": precision must be one of fp32, bf16, got ", name);
  STD_TORCH_CHECK(name == "fp32" || recheck, "sapwood.", op,
                  ": precision must be fp32 without recheck, got ", name);
  return name == "bf16";
}

inline void check_k(const char* op, int64_t k) {
  STD_TORCH_CHECK(k >= 1, "sapwood.", op, ": k must be at least 1, got ", k);
}

}  // namespace sapwood::similarity
