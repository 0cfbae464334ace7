// Tensors as the CUDA ops use them: typed pointers, choice of a kernel by dtype, the check that two
// arguments share a device, and calls of torch's own ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/checks.h"
#include "common/tensor.h"

namespace sapwood {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Type {
  using type = T;
};

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// `first` names `like`, the argument that decides the device.
inline void check_device(const char* op, const char* argument, const Tensor& t, const char* first,
                         const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), "sapwood.", op, ": ", first, " is on ",
                  device_text(like), " but ", argument, " is on ", device_text(t));
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Calls f(Type<T>) with the type of x.
template <class F>
void dispatch_float(const char* op, const char* argument, const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::Half:
      return f(Type<c10::Half>{});
    case ScalarType::BFloat16:
      return f(Type<c10::BFloat16>{});
    default:
      check_dtype(op, argument, x, false, "float32, float64, float16 or bfloat16");
  }
}

// Calls an op that returns one tensor. Every argument of its schema is given, defaults included.
template <class... Args>
Tensor call(const char* op, const char* overload, Args... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sapwood
