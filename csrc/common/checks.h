// Checks that memory safety needs, in the wording of the Python layer. They are reached only by
// callers of torch.ops.sapwood.*, the public functions check first.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>

namespace sapwood {

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(sizes[i]);
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline void check_dim(const char* op, const char* argument, const torch::stable::Tensor& t,
                      int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, "sapwood.", op, ": ", argument, " must have ", dim,
                  " dimensions, got shape ", shape_text(t.sizes()));
}

inline void check_shape(const char* op, const char* argument, const torch::stable::Tensor& t,
                        torch::headeronly::IntHeaderOnlyArrayRef expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = t.size(static_cast<int64_t>(i)) == expected[i];
  }
  STD_TORCH_CHECK(same, "sapwood.", op, ": ", argument, " must have shape ", shape_text(expected),
                  ", got ", shape_text(t.sizes()));
}

inline void check_dtype(const char* op, const char* argument, const torch::stable::Tensor& t,
                        bool legal, const char* expected) {
  STD_TORCH_CHECK(legal, "sapwood.", op, ": ", argument, " must be ", expected, ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// For sizes whose numbers are kept in 32 bits.
inline void check_int32(const char* op, const char* what, int64_t size) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), "sapwood.", op, ": ", what,
                  " must be fewer than 2^31, got ", size);
}

}  // namespace sapwood
