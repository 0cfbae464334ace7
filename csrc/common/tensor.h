// Tensors as the ops use them: typed pointers, the type to compute in, new ones, contiguous copies.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

// A contiguous tensor on the device of `like`, of its type or another. torch::stable::new_empty goes
// by the name of an op and boxes its arguments, which costs a small op as much as its kernel.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType type) {
  constexpr size_t kMostDims = 8;
  STD_TORCH_CHECK(sizes.size() <= kMostDims, "sapwood: a result has at most ", kMostDims,
                  " dimensions");
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides, dtype, device,
                                                         like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

// The tensor itself where it is contiguous.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  return as_contiguous(in_type(t, type));
}

}  // namespace sapwood
