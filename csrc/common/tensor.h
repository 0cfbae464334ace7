// Tensors as the ops use them: typed pointers, the type to compute in, contiguous copies, scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <new>

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

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor converted = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Uninitialised memory for one call, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlign))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace sapwood
