// Backward on the device: a warp owns a Gaussian, its lanes walk the rows that the ellipse reaches, and
// one tree of shuffles sums them. A Gaussian of many pixels is taken by all four warps of the block.
// No atomics: the order of every sum follows from the shapes.
#pragma once

#include "splat2d/cuda_tiles.cuh"

namespace sapwood::splat2d::device {

inline constexpr int64_t kLargeRows = 64;  // of the bounding box: worth four warps
inline constexpr int kColumns = 8;         // lanes of a warp along a row

// The gradient of the images (B, C, H, W), contiguous, and the features.
template <class T>
struct Inputs {
  const Gaussian<T>* gaussians;
  const T *feat, *grad;
  Shape s;
};

template <class T>
struct Outputs {
  T *mu, *chol, *feat, *abs_mu;  // abs_mu may be null
};

// Moments of s = w <feat, grad>, and the sums of w grad of C channels.
template <class T, int C, bool moments>
struct Sums {
  static constexpr int first = moments ? 7 : 0;  // of the channels
  static constexpr int count = first + C;
  T values[count];  // u, v, uu, uv, vv, |d mx|, |d my|; channels
};

// Adds rows top + row, top + row + row_step, ... of Gaussian i. With `moments` the product with all
// channels is taken; `channel` is the first whose sum of w grad is wanted.
template <class T, int C, bool moments>
__device__ void walk(const Inputs<T>& in, int64_t i, int64_t channel, int row, int row_step,
                     Sums<T, C, moments>& sums) {
  const Gaussian<T> g = in.gaussians[i];
  const Shape& s = in.s;
  const T* feat = in.feat + i * s.channels;
  const T* item = in.grad + i / s.n * s.channels * s.height * s.width;
  const int64_t plane = s.height * s.width;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  for (int64_t y = g.top + row; y < g.bottom; y += row_step) {
    int64_t first, last;
    columns_of_row(g, y, s.width, first, last);
    const T e = (static_cast<T>(y) - g.my) * g.per_y;
    SAPWOOD_NO_UNROLL  // four pixels at a time spill registers
        for (int64_t x = first + column; x <= last; x += kColumns) {
      const T u = (static_cast<T>(x) - g.mx) * g.per_x, v = e - g.skew * u;
      const T q = u * u + v * v;
      if (!(q <= g.limit)) continue;
      const T w = power_of_two(-q);
      const T* at = item + y * s.width + x;
      SAPWOOD_UNROLL
      for (int c = 0; c < C; ++c) {
        sums.values[sums.first + c] += w * at[(channel + c) * plane];
      }
      if constexpr (moments) {
        T dot = 0;
        for (int64_t c = 0; c < s.channels; ++c) dot += feat[c] * at[c * plane];
        const T m = w * dot, along = m * (u - g.skew * v);
        sums.values[0] += m * u;
        sums.values[1] += m * v;
        sums.values[2] += m * u * u;
        sums.values[3] += m * u * v;
        sums.values[4] += m * v * v;
        sums.values[5] += along < T(0) ? -along : along;
        sums.values[6] += m * v < T(0) ? -(m * v) : m * v;
      }
    }
  }
}

template <class T, int C, bool moments>
__device__ void sum_over_warp(Sums<T, C, moments>& sums) {
  SAPWOOD_UNROLL
  for (int i = 0; i < sums.count; ++i) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sums.values[i] += __shfl_xor_sync(kFullMask, sums.values[i], distance);
    }
  }
}

// Derivatives in position and shape from the moments of the scaled u and v.
template <class T>
__device__ void write_moments(const Gaussian<T>& g, int64_t i, const T* moments,
                              const Outputs<T>& to) {
  constexpr T back = static_cast<T>(1 / kScale);
  const T u = moments[0] * back, v = moments[1] * back, uu = moments[2] * back;
  const T uv = moments[3] * back, vv = moments[4] * back;
  const T per_x = g.per_x * back, per_y = g.per_y * back;  // 1 / l1 and 1 / l3
  to.mu[2 * i] = (u - g.skew * v) * per_x;
  to.mu[2 * i + 1] = v * per_y;
  to.chol[3 * i] = (uu - g.skew * uv) * back * per_x;
  to.chol[3 * i + 1] = uv * back * per_y;
  to.chol[3 * i + 2] = vv * back * per_y;
  if (to.abs_mu != nullptr) {
    to.abs_mu[2 * i] = moments[5] * back * per_x;
    to.abs_mu[2 * i + 1] = moments[6] * back * per_y;
  }
}

template <class T, int C, bool moments>
__device__ void write(const Inputs<T>& in, int64_t i, int64_t channel,
                      const Sums<T, C, moments>& sums, const Outputs<T>& to) {
  T* feat = to.feat + i * in.s.channels + channel;
  for (int c = 0; c < C; ++c) feat[c] = sums.values[sums.first + c];
  if constexpr (moments) write_moments(in.gaussians[i], i, sums.values, to);
}

template <class T, int C, bool moments>
__global__ void __launch_bounds__(kThreads, 1)
    differentiate_kernel(Inputs<T> in, int64_t channel, Outputs<T> to) {
  using Totals = Sums<T, C, moments>;
  SAPWOOD_SHARED(Totals, partial, kWarps);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t total = in.s.batch * in.s.n;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps; first < total;
       first += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t own = first + warp;
    const bool exists = own < total;
    if (exists && in.gaussians[own].bottom - in.gaussians[own].top < kLargeRows) {
      Totals sums{};
      walk<T, C, moments>(in, own, channel, lane / kColumns, kWarp / kColumns, sums);
      sum_over_warp(sums);
      if (lane == 0) write<T, C, moments>(in, own, channel, sums, to);
    }
    for (int64_t i = first; i < first + kWarps && i < total; ++i) {
      if (in.gaussians[i].bottom - in.gaussians[i].top < kLargeRows) continue;
      Totals sums{};
      walk<T, C, moments>(in, i, channel, static_cast<int>(threadIdx.x) / kColumns,
                          kThreads / kColumns, sums);
      sum_over_warp(sums);
      if (lane == 0) partial[warp] = sums;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < kWarps; ++w) {
          for (int v = 0; v < Totals::count; ++v) sums.values[v] += partial[w].values[v];
        }
        write<T, C, moments>(in, i, channel, sums, to);
      }
      __syncthreads();
    }
  }
}

template <class T, int C, bool moments>
void launch_differentiate_channels(const Inputs<T>& in, int64_t channel, const Outputs<T>& to,
                                   Stream stream) {
  auto kernel = differentiate_kernel<T, C, moments>;
  SAPWOOD_LAUNCH(kernel, grid_of(in.s.batch * in.s.n * kWarp), kThreads, 0, stream, in, channel,
                 to);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool moments>
void launch_differentiate_some(const Inputs<T>& in, int64_t channel, const Outputs<T>& to,
                               Stream stream) {
  switch (in.s.channels - channel) {
    case 1:
      return launch_differentiate_channels<T, 1, moments>(in, channel, to, stream);
    case 2:
      return launch_differentiate_channels<T, 2, moments>(in, channel, to, stream);
    case 3:
      return launch_differentiate_channels<T, 3, moments>(in, channel, to, stream);
    default:
      return launch_differentiate_channels<T, 4, moments>(in, channel, to, stream);
  }
}

// The moments with the first four channels, then four channels at a time.
template <class T>
void launch_differentiate(const Inputs<T>& in, const Outputs<T>& to, Stream stream) {
  launch_differentiate_some<T, true>(in, 0, to, stream);
  for (int64_t channel = 4; channel < in.s.channels; channel += 4) {
    launch_differentiate_some<T, false>(in, channel, to, stream);
  }
}

}  // namespace sapwood::splat2d::device
