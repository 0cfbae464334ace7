// Pieces that the device kernels of logsemiring share: sizes, strided views, the policy for infinities.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/launch.h"

// A loop whose body holds an exponential gains nothing from unrolling, and may spill.
#if defined(__CUDACC__)
#define SAPWOOD_ROLLED _Pragma("unroll 1")
#else
#define SAPWOOD_ROLLED
#endif

namespace sapwood::logsemiring::device {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;
inline constexpr int kTile = 16;   // outputs of a block: kTile x kTile, one per thread
inline constexpr int kDepth = 32;  // terms in shared memory at a time
inline constexpr int kPitch = kDepth + 1;

template <class T>
SAPWOOD_HD inline T infinity() {
  return static_cast<T>(INFINITY);
}

// A batch of matrices of any strides.
template <class T>
struct Batched {
  const T* data;
  int64_t batch, row, col;

  SAPWOOD_HD T operator()(int64_t b, int64_t i, int64_t j) const {
    return data[b * batch + i * row + j * col];
  }
  Batched transposed() const { return {data, batch, col, row}; }
};

// One term of a sum whose maximum is `top`; 1 at the maximum, so that +inf counts its terms. For a
// maximum of -inf the terms are 0, and NaN stays NaN.
template <class T>
SAPWOOD_HD inline T scaled(T x, T top) {
  if (x == top) return top == -infinity<T>() ? T(0) : T(1);
  return std::exp(x - (top == -infinity<T>() ? T(0) : top));
}

template <class T>
SAPWOOD_HD inline T larger(T x, T top) {  // ignores NaN in x
  return x > top ? x : top;
}

// The log of a sum, given its maximum and the sum of scaled terms.
template <class T>
SAPWOOD_HD inline T log_of(T top, T sum) {
  if (sum != sum) return sum;
  const bool infinite = top == infinity<T>() || top == -infinity<T>();
  return infinite ? top : top + std::log(sum);
}

// What turns a scaled term into a probability: 0 where no term has mass.
template <class T>
SAPWOOD_HD inline T inverse(T top, T sum) {
  return top == -infinity<T>() && sum == sum ? T(0) : T(1) / sum;
}

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

inline unsigned batch_grid(int64_t batch) {
  return static_cast<unsigned>(batch < 65535 ? batch : 65535);
}

inline int64_t tiles_of(int64_t n) {
  return (n + kTile - 1) / kTile;
}

}  // namespace sapwood::logsemiring::device
