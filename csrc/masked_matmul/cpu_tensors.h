// What the CPU ops of this family share: types to kernels, activations from their names, scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "masked_matmul/kernel.h"

namespace sapwood::masked_matmul {

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

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor converted = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "sapwood.", op,
                  ": activation must be none, relu, gelu, gelu_tanh or silu, got ", name);
  return Activation::silu;
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

// f(T{}, Value{}) for activations computed in T and weights stored as Value.
template <class F>
void with_types(const char* op, ScalarType x, ScalarType values, const F& f) {
  STD_TORCH_CHECK(x == values || (x == ScalarType::Float && is_half(values)), "sapwood.", op,
                  ": values must have input's dtype, or be float16 or bfloat16 for a float32 input,"
                  " got ",
                  torch::headeronly::toString(values), " for ", torch::headeronly::toString(x));
  switch (values) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(float{}, BFloat16{});
    case ScalarType::Half:
      return f(float{}, Float16{});
    default:
      STD_TORCH_CHECK(false, "sapwood.", op, ": values must be floating point, got ",
                      torch::headeronly::toString(values));
  }
}

// f(Bits{}) for an unsigned integer of the size of an element.
template <class F>
void with_bits(const char* op, const Tensor& t, const F& f) {
  switch (t.element_size()) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    default:
      STD_TORCH_CHECK(false, "sapwood.", op, ": weight must be floating point, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// f(Index{}) for column indices of a matrix with `columns` columns.
template <class F>
void with_index(const char* op, ScalarType type, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::Short || type == ScalarType::Int, "sapwood.", op,
                  ": cols must be int16 bit patterns or int32, got ",
                  torch::headeronly::toString(type));
  if (type == ScalarType::Short) return f(uint16_t{});
  return f(int32_t{});
}

inline ScalarType index_type(int64_t columns) {
  return columns <= 65536 ? ScalarType::Short : ScalarType::Int;
}

}  // namespace sapwood::masked_matmul
