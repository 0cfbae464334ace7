// Rows on the device: what normalises each, in double, and the normalised copy. A warp owns a row.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/launch.h"

namespace sapwood::similarity::device {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of every kernel here
inline constexpr int kWarps = kThreads / kWarp;

enum class Kind { dot, cosine, correlation, euclidean };

SAPWOOD_HD inline bool is_unit(Kind kind) {
  return kind == Kind::cosine || kind == Kind::correlation;
}

// The entry c of a normalised row is (x_c * scale - mean) * inverse; inverse is 0 for a row without
// direction, `weight` is the norm that bounds the error of its products.
struct Row {
  double scale, mean, inverse, weight;
};

// A (N, K) contiguous matrix and its rows.
template <class T>
struct Operand {
  const T* x;
  const T* unit;  // (N, K) normalised
  const Row* rows;
  int64_t n;
};

template <class T>
SAPWOOD_HD T larger(T a, T b) {
  return a < b ? b : a;
}

__device__ inline double sum_over_warp(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullMask, value, distance);
  }
  return value;
}

__device__ inline double max_over_warp(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

// 2^-e for a largest magnitude in [2^e, 2^(e+1)); the clamp keeps the factor finite.
__device__ inline double scale_for(double peak) {
  if (!(peak > 0.0)) return 1.0;
  const int exponent = ilogb(peak);
  return ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
}

template <class T>
__device__ Row describe_row(const T* x, int64_t k, Kind kind, int lane) {
  double peak = 0;
  int broken = 0, different = 0;
  for (int64_t c = lane; c < k; c += kWarp) {
    const double magnitude = fabs(static_cast<double>(x[c]));
    broken |= !(magnitude <= 1.7976931348623157e308);
    different |= static_cast<double>(x[c]) != static_cast<double>(x[0]);
    peak = larger(peak, broken ? 0.0 : magnitude);
  }
  broken = __ballot_sync(kFullMask, broken) != 0;
  different = __ballot_sync(kFullMask, different) != 0;
  peak = max_over_warp(peak);
  Row row{1, 0, 0, 0};
  if (broken || (kind == Kind::correlation && !different)) return row;
  if (is_unit(kind)) row.scale = scale_for(peak);
  if (kind == Kind::correlation) {
    double sum = 0;
    for (int64_t c = lane; c < k; c += kWarp) sum += static_cast<double>(x[c]) * row.scale;
    row.mean = sum_over_warp(sum) / static_cast<double>(k);
  }
  double squares = 0;
  for (int64_t c = lane; c < k; c += kWarp) {
    const double v = static_cast<double>(x[c]) * row.scale - row.mean;
    squares += v * v;
  }
  squares = sum_over_warp(squares);
  row.weight = is_unit(kind) ? 1.0 : sqrt(squares);
  row.inverse = !is_unit(kind) ? 1.0 : squares > 0.0 ? 1.0 / sqrt(squares) : 0.0;
  return row;
}

// Row i of a matrix by one warp; rows may be null: only the normalised copy is wanted.
template <class T>
__device__ void normalize_row(const T* x, int64_t i, int64_t k, Kind kind, int lane, T* unit,
                              Row* rows) {
  const Row row = describe_row(x + i * k, k, kind, lane);
  for (int64_t c = lane; c < k; c += kWarp) {
    const double v = (static_cast<double>(x[i * k + c]) * row.scale - row.mean) * row.inverse;
    unit[i * k + c] = row.inverse == 0.0 ? T(0) : static_cast<T>(v);
  }
  if (rows != nullptr && lane == 0) rows[i] = row;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const T* x, int64_t n, int64_t k, Kind kind, T* unit, Row* rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < n; i += step) {
    normalize_row(x, i, k, kind, lane, unit, rows);
  }
}

inline unsigned grid_of(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

template <class T>
void launch_normalize(const T* x, int64_t n, int64_t k, Kind kind, T* unit, Row* rows,
                      Stream stream) {
  if (n == 0) return;
  auto kernel = normalize_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(n, kWarps), kThreads, 0, stream, x, n, k, kind, unit, rows);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::similarity::device
