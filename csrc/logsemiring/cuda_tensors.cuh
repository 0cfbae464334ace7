// Tensors to kernels: types, views, checks.
#pragma once

#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/cuda.h"
#include "common/cuda_tensor.h"
#include "logsemiring/cuda_common.cuh"

namespace sapwood::logsemiring::device {

using OptionalTensor = std::optional<Tensor>;

inline Tensor widened(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  return half ? torch::stable::to(t, ScalarType::Float) : t;
}

inline Tensor restored(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Calls f(T{}) for float32 or float64.
template <class F>
inline void with_type(const char* op, const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  check_dtype(op, "argument", t, false, "float32, float64, float16 or bfloat16");
}

template <class T>
Batched<T> batched(const Tensor& t) {
  return {input<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check_device(op, argument, t, "a", like);
  check_dtype(op, argument, t, t.scalar_type() == like.scalar_type(), "of a's dtype");
}

}  // namespace sapwood::logsemiring::device
