// What the CPU ops of this family share: types to kernels, activations from their names.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "masked_matmul/kernel.h"

namespace sapwood::masked_matmul {

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "sapwood.", op,
                  ": activation must be none, relu, gelu, gelu_tanh or silu, got ", name);
  return Activation::silu;
}

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
