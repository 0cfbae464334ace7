// Tensors as the ops use them: typed pointers, the type to compute in, contiguous copies.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace sapwood {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline bool is_half(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Double for float64, float for float32 and half precision.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType compute_type(const Tensor& t) {
  return compute_type(t.scalar_type());
}

inline Tensor in_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor converted = in_type(t, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

}  // namespace sapwood
