// Checks of arguments that memory safety needs, for CPU and GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>

#include "common/checks.h"

namespace sapwood::splat2d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_same_type(const char* op, const char* argument, const Tensor& t,
                            const Tensor& mu) {
  STD_TORCH_CHECK(t.scalar_type() == mu.scalar_type(), "sapwood.", op, ": ", argument,
                  " must have mu's dtype ", torch::headeronly::toString(mu.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// mu (B, N, 2), chol (B, N, 3), counts (B,).
inline void check_gaussians(const char* op, const Tensor& mu, const Tensor& chol,
                            const std::optional<Tensor>& counts) {
  check_dim(op, "mu", mu, 3);
  const int64_t batch = mu.size(0), n = mu.size(1);
  check_shape(op, "mu", mu, {batch, n, 2});
  check_shape(op, "chol", chol, {batch, n, 3});
  const ScalarType type = mu.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Double ||
                        type == ScalarType::Half || type == ScalarType::BFloat16;
  check_dtype(op, "mu", mu, floating, "float32, float64, float16 or bfloat16");
  check_same_type(op, "chol", chol, mu);
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "sapwood.", op,
                  ": mu must have fewer than 2^31 Gaussians, got ", n);
  if (!counts) return;
  check_shape(op, "counts", *counts, {batch});
  check_dtype(op, "counts", *counts, counts->scalar_type() == ScalarType::Long, "int64");
}

inline void check_features(const char* op, const Tensor& feat, const Tensor& mu) {
  check_dim(op, "feat", feat, 3);
  check_shape(op, "feat", feat, {mu.size(0), mu.size(1), feat.size(2)});
  check_same_type(op, "feat", feat, mu);
  STD_TORCH_CHECK(feat.size(2) >= 1, "sapwood.", op, ": feat must have at least 1 channel, got 0");
}

// A pixel's coordinates are exact in float32 up to 2^24.
inline void check_size(const char* op, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height >= 1 && width >= 1, "sapwood.", op,
                  ": size must be at least (1, 1), got (", height, ", ", width, ")");
  constexpr int64_t most = int64_t{1} << 24;
  STD_TORCH_CHECK(height <= most && width <= most, "sapwood.", op, ": size must be at most (", most,
                  ", ", most, "), got (", height, ", ", width, ")");
}

inline void check_cutoff(const char* op, double cutoff) {
  STD_TORCH_CHECK(cutoff > 0, "sapwood.", op, ": cutoff must be positive, got ", cutoff);
}

// grad (B, C, H, W).
inline void check_gradient(const char* op, const Tensor& grad, const Tensor& feat,
                           const Tensor& mu) {
  check_dim(op, "grad", grad, 4);
  check_size(op, grad.size(2), grad.size(3));
  check_shape(op, "grad", grad, {mu.size(0), feat.size(2), grad.size(2), grad.size(3)});
  check_same_type(op, "grad", grad, mu);
}

}  // namespace sapwood::splat2d
