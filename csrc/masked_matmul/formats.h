// The storage formats, seen by every kernel. Byte by byte they are described in README.md.
#pragma once

#include <bit>
#include <cstdint>

#include "common/simd.h"

namespace sapwood::masked_matmul {

constexpr int64_t kChunkRows = 128;  // rows that share a block of sums; row_order sorts inside
constexpr int64_t kSliceRows = 64;   // sell: rows that advance together
constexpr int64_t kWindow = 31;      // sell: columns a step can reach
constexpr uint8_t kAbsent = 31;    // sell: index of a lane without a weight; the slot reads as zero
constexpr int64_t kWordBits = 16;  // bitmap
constexpr int64_t kMaxPanel = 64;  // batch rows handled together

enum class Activation { none, relu, gelu, gelu_tanh, silu };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SAPWOOD_INLINE float widen(float v) {
  return v;
}
SAPWOOD_INLINE double widen(double v) {
  return v;
}
SAPWOOD_INLINE float widen(BFloat16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}
SAPWOOD_INLINE float widen(Float16 v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  // The product moves the exponent bias from 15 to 127 and makes subnormal halves normal.
  const uint32_t value = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p+112f) |
                         (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
  return std::bit_cast<float>(value | (static_cast<uint32_t>(v.bits & 0x8000u) << 16));
}

// Where results go: y (B, N) row-major, y = activation(sum + bias).
template <class T>
struct Output {
  T* y;
  int64_t n;
  const T* bias;  // (N,) or null
  Activation activation;
};

// A matrix (N, K) in compressed rows. Index is uint16_t (K <= 65536) or int32_t.
template <class Value, class Index>
struct Csr {
  const Value* values;
  const Index* cols;
  const int64_t* row_ptr;  // (N + 1,)
  int64_t n;
  int64_t k;
};

template <class Value>
struct Bitmap {
  const Value* values;
  const uint16_t* words;  // (N, ceil(K / 16))
  const int64_t* row_ptr;
  int64_t n;
  int64_t k;
  int64_t words_per_row() const { return (k + kWordBits - 1) / kWordBits; }
};

template <class Value>
struct Sell {
  const Value* values;    // (steps, 64)
  const uint8_t* index;   // (steps, 64) column minus the step's window, kAbsent where there is none
  const int32_t* window;  // (steps,) first column of the step
  const int64_t* slice_ptr;  // (ceil(N / 64) + 1,) first step of every slice
  int64_t n;
  int64_t k;
};

}  // namespace sapwood::masked_matmul
