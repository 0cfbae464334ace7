// Pieces that the device kernels of masked_matmul share. No torch library is needed to compile this:
// c10::Half and c10::BFloat16 are header-only, so the sanitizer programs drive the kernels alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/launch.h"

namespace sapwood::masked_matmul::device {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of every kernel here
inline constexpr int kWarps = kThreads / kWarp;

// float for everything but double
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V neighbouring elements, loaded and stored as one
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// Column indices: uint16 where they fit, else int32.
struct Columns {
  const void* data;
  bool wide;

  SAPWOOD_HD int32_t operator[](int64_t i) const {
    return wide ? static_cast<const int32_t*>(data)[i]
                : static_cast<int32_t>(static_cast<const uint16_t*>(data)[i]);
  }
};

struct WritableColumns {
  void* data;
  bool wide;

  SAPWOOD_HD void set(int64_t i, int64_t column) const {
    if (wide) {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(column);
    } else {
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(column);
    }
  }
};

// A (rows, columns) matrix of any strides.
template <class T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;

  SAPWOOD_HD T operator()(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

enum class Activation { none, relu, gelu, gelu_tanh, silu };

template <class A>
SAPWOOD_HD A activate(A v, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return v < A(0) ? A(0) : v;  // keeps NaN
    case Activation::gelu:
      return A(0.5) * v * (A(1) + std::erf(v * A(0.70710678118654752440)));
    case Activation::gelu_tanh:
      return A(0.5) * v *
             (A(1) + std::tanh(A(0.79788456080286535588) * (v + A(0.044715) * v * v * v)));
    case Activation::silu:
      return v / (A(1) + std::exp(-v));
    case Activation::none:
      break;
  }
  return v;
}

// Bias and activation, rounded once to the output type.
template <class T>
struct Epilogue {
  T* out;         // (B, N)
  const T* bias;  // (N,) or null
  int64_t n;
  Activation activation;

  SAPWOOD_HD void store(int64_t b, int64_t row, Accumulator<T> sum) const {
    if (bias) sum += static_cast<Accumulator<T>>(bias[row]);
    out[b * n + row] = static_cast<T>(activate(sum, activation));
  }
};

// Trades half of the values that are left with the lane across, then a quarter, and so on. Recursive,
// so that every index is a constant and the values stay in registers.
template <int Half, int A, class T>
__device__ void trade_halves(T (&value)[A], int lane) {
  if constexpr (Half > 0) {
    const bool upper = lane & Half;
    SAPWOOD_UNROLL
    for (int j = 0; j < Half; ++j) {
      const T given = upper ? value[j] : value[j + Half];
      const T kept = upper ? value[j + Half] : value[j];
      value[j] = kept + __shfl_xor_sync(kFullMask, given, Half);
    }
    trade_halves<Half / 2>(value, lane);
  }
}

// Sums A values over the lanes of a warp at once: afterwards lane l holds the total of value l % A.
// A = 32 costs 31 shuffles instead of 160. The order of additions is fixed.
template <int A, class T>
__device__ T reduce_scatter(T (&value)[A], int lane) {
  static_assert(A > 0 && A <= kWarp && (A & (A - 1)) == 0);
  trade_halves<A / 2>(value, lane);
  T total = value[0];
  SAPWOOD_UNROLL
  for (int distance = A; distance < kWarp; distance *= 2) {
    total += __shfl_xor_sync(kFullMask, total, distance);
  }
  return total;
}

template <class T>
SAPWOOD_HD constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

inline unsigned grid_x(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(smaller<int64_t>(blocks, 0x7fffffff));
}

inline unsigned grid_y(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(smaller<int64_t>(blocks, 65535));
}

SAPWOOD_HD constexpr int64_t panel_count(int64_t batch, int64_t width) {
  return (batch + width - 1) / width;
}

// Repacks x (B, C) into panels (ceil(B / P), C, P): the P batch entries of a column lie side by
// side, so that a warp reads them as one line. The last panel is filled with zeros.
template <class T, int P>
__global__ void __launch_bounds__(kThreads)
    panel_kernel(Strided<T> x, int64_t batch, int64_t columns, T* panels) {
  constexpr int kPitch = kWarp + 1;  // one more column keeps the transposed reads off one bank
  SAPWOOD_SHARED(T, tile, kWarp * kPitch);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column_tiles = (columns + kWarp - 1) / kWarp;
  const int64_t tiles = panel_count(batch, P) * (P / kWarp) * column_tiles;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t b0 = t / column_tiles * kWarp;
    const int64_t c0 = t % column_tiles * kWarp;
    for (int r = first; r < kWarp; r += kWarps) {
      const bool inside = b0 + r < batch && c0 + lane < columns;
      tile[r * kPitch + lane] = inside ? x(b0 + r, c0 + lane) : T(0.0f);
    }
    __syncthreads();
    const int64_t b = b0 + lane;
    for (int r = first; r < kWarp && c0 + r < columns; r += kWarps) {
      panels[((b / P) * columns + c0 + r) * P + b % P] = tile[lane * kPitch + r];
    }
    __syncthreads();
  }
}

template <class T, int P>
void launch_panels(Strided<T> x, int64_t batch, int64_t columns, T* panels, Stream stream) {
  if (batch == 0 || columns == 0) return;
  const int64_t tiles = panel_count(batch, P) * (P / kWarp) * ((columns + kWarp - 1) / kWarp);
  auto kernel = panel_kernel<T, P>;
  SAPWOOD_LAUNCH(kernel, grid_x(tiles, 1), kThreads, 0, stream, x, batch, columns, panels);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::masked_matmul::device
