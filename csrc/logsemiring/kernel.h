// Sums in the log semiring: (+) is logaddexp, (x) is +, zero is -inf. The ladder of log_matmul, each
// rung with what it gains over the one before (256^3, fp32, one AVX-512 core; README.md has figures):
//   1 naive            per output the maximum of its own terms, then the sum: the oracle of the tests
//   2 exact            the same two passes on 8 x 32 tiles in registers with our own exp
//   3 GEMM             M K + K N exponentials instead of M N K: one shift per row of a and column of
//                      b, then an ordinary product; underflow makes some results wrong
//   4 certificate      a bound that says which results of rung 3 are right; the others go to rung 2
// The certificate: with E = exp(a - max), F = exp(b - max) in (0, 1] nothing cancels, and each of K
// terms loses at most the smallest normal number to underflow. S = E F is therefore right to
// rounding where S >= K * (smallest normal) / eps.
// No torch header here; nothing allocates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push  // gcc 12 warns of its own header's undefined values
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/math.h"
#include "common/simd.h"

namespace sapwood::logsemiring {

template <class T>
inline constexpr T kInf = std::numeric_limits<T>::infinity();

// A matrix of any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, col_stride;

  const T& at(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix transposed() const { return {data, col_stride, row_stride}; }
};

// Sizes of tiles; the same for every instruction set, so that buffers are.
inline constexpr int64_t kRows = 12;          // rows of a register tile of the GEMM
inline constexpr int64_t kTileRows = 48;      // rows of a task's tile
inline constexpr int64_t kGroup = 8;          // rows of a tile of the exact kernel
inline constexpr int64_t kDepth = 192;        // terms per pass of the GEMM: a strip stays in L1
inline constexpr int64_t kExactDepth = 4096;  // terms per pass of the exact kernel
inline constexpr int64_t kBlock = 16;         // terms that max_matmul looks at as one
inline constexpr int64_t kChains = 8;         // chains that log_scan walks side by side
template <class T>
inline constexpr int64_t kStrip = 128 / static_cast<int64_t>(sizeof(T));  // columns of a panel
template <class T>
inline constexpr int64_t kTileCols = 8 * kStrip<T>;

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// S below this may have lost more than a rounding to underflow.
template <class T>
T certificate(int64_t k) {
  const T least = std::numeric_limits<T>::min() / (std::numeric_limits<T>::epsilon() / 2);
  return static_cast<T>(std::max<int64_t>(k, 1)) * least;
}

// Rung 1, in double: c (m, n) from a (m, k) and b (k, n), contiguous.
template <class T>
void log_matmul_naive(const T* a, const T* b, double* c, int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double top = -kInf<double>, sum = 0;
      bool nan = false;
      for (int64_t l = 0; l < k; ++l) {
        const double x = static_cast<double>(a[i * k + l]) + static_cast<double>(b[l * n + j]);
        nan = nan || x != x;
        top = x > top ? x : top;
      }
      const bool finite = top > -kInf<double> && top < kInf<double>;
      for (int64_t l = 0; finite && l < k; ++l) {
        sum +=
            std::exp(static_cast<double>(a[i * k + l]) + static_cast<double>(b[l * n + j]) - top);
      }
      c[i * n + j] = nan ? std::nan("") : finite ? top + std::log(sum) : top;
    }
  }
}

// Flushes subnormal numbers to zero inside a scope, on this thread: a product of two small factors
// would cost a hundred cycles otherwise, and the certificate allows for the loss.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushSubnormals() {}
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// One operand of the GEMM: `lane` is the row of the left and the column of the right operand,
// `depth` the summed index. With shifts an element enters as exp(x - shift).
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, depth_stride;
  const T* lane_shift = nullptr;
  const T* depth_shift = nullptr;
};

// The packed terms of a tile, and for the second order the packed tangents.
template <class T>
struct Packed {
  T *a, *b, *h, *g;
};

// What the gradient of a tile needs of each output: (kGroup, kStrip).
template <class T>
struct Weights {
  T *shift, *weight, *mean;  // weight = grad / sum; mean = q, for the second order
};

}  // namespace sapwood::logsemiring

#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_vector.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_gemm.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_exact.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_exact_backward.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_tropical.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "logsemiring/kernel_scan.inl"
#include "common/foreach_isa.h"
