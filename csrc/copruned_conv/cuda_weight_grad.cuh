// Gradients of weights and bias on the device. A block owns its outputs and adds all pixels in order:
// no atomics, the same result every time.
#pragma once

#include "copruned_conv/cuda_conv.cuh"

namespace sapwood::copruned_conv::device {

// `conv` describes the forward pass: its x, masks, items and taps; the rest is unused.
template <class S>
struct WeightGrad {
  Conv<S> conv;
  const S* slopes;   // (batch, out_rows, out_cols, filters)
  S *weight, *bias;  // (filters, channels, taps) or (filters, 1, taps); (filters,)
};

inline constexpr int kDepth = 32;  // pixels in shared memory at a time

// Block (tap, 16 channels, 32 filters); each thread has one channel and four filters.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) weight_kernel(WeightGrad<S> g) {
  using T = typename Sum<S>::type;
  SAPWOOD_SHARED(T, a, kDepth * (kSlice + 1));
  SAPWOOD_SHARED(T, d, kDepth * kFilters);
  const Conv<S>& c = g.conv;
  const int tid = static_cast<int>(threadIdx.x), across = tid % kAcross, down = tid / kAcross;
  const int64_t lines = (c.channels + kSlice - 1) / kSlice;
  const int64_t blocks = (c.filters + kFilters - 1) / kFilters, taps = c.taps.count;
  for (int64_t work = blockIdx.x; work < taps * lines * blocks; work += gridDim.x) {
    const int tap = static_cast<int>(work % taps);
    const int64_t channel = work / taps % lines * kSlice, filter = work / taps / lines * kFilters;
    T sums[kEach] = {};
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t pixels = c.pixels_of(b);
      for (int64_t first = 0; first < pixels; first += kDepth) {
        __syncthreads();
        for (int e = tid; e < kDepth * (kSlice + kFilters); e += kThreads) {
          const int p = e / (kSlice + kFilters), k = e % (kSlice + kFilters);
          int64_t i, j;
          const bool inside = first + p < pixels && c.locate(b, first + p, &i, &j);
          T value = T(0);
          if (k < kSlice) {
            const int64_t at = channel + k;
            const int64_t from = inside ? c.source(b, i, j, tap) : -1;
            if (from >= 0 && at < c.channels && c.input_on(b, at)) {
              value = static_cast<T>(c.x[from * c.channels + at]);
            }
            a[p * (kSlice + 1) + k] = value;
          } else {
            const int64_t at = filter + k - kSlice;
            if (inside && at < c.filters && c.filter_on(b, at)) {
              value = static_cast<T>(g.slopes[c.place(b, i, j) * c.filters + at]);
            }
            d[p * kFilters + k - kSlice] = value;
          }
        }
        __syncthreads();
        for (int p = 0; p < kDepth; ++p) {
          const T value = a[p * (kSlice + 1) + down];
          SAPWOOD_UNROLL
          for (int f = 0; f < kEach; ++f) sums[f] += value * d[p * kFilters + across * kEach + f];
        }
      }
    }
    SAPWOOD_UNROLL
    for (int f = 0; f < kEach; ++f) {
      const int64_t k = filter + across * kEach + f, at = channel + down;
      if (k < c.filters && at < c.channels) {
        g.weight[(k * c.channels + at) * taps + c.taps.weight[tap]] = static_cast<S>(sums[f]);
      }
    }
  }
}
static_assert(kDown == kSlice);

// Sums over the pixels for one filter: threads take every 128th, then add up in a fixed tree. With
// `tap` below 0 the slopes alone, else times the depthwise channel's input.
template <class S>
__device__ inline typename Sum<S>::type sum_over_pixels(const WeightGrad<S>& g, int64_t filter,
                                                        int tap, typename Sum<S>::type* shared) {
  using T = typename Sum<S>::type;
  const Conv<S>& c = g.conv;
  T sum = T(0);
  for (int64_t b = 0; b < c.batch; ++b) {
    if (!c.filter_on(b, filter) || (tap >= 0 && !c.input_on(b, filter))) continue;
    for (int64_t p = threadIdx.x; p < c.pixels_of(b); p += kThreads) {
      int64_t i, j;
      if (!c.locate(b, p, &i, &j)) continue;
      const T slope = static_cast<T>(g.slopes[c.place(b, i, j) * c.filters + filter]);
      const int64_t from = tap < 0 ? 0 : c.source(b, i, j, tap);
      if (from < 0) continue;
      sum += tap < 0 ? slope : slope * static_cast<T>(c.x[from * c.channels + filter]);
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T total = shared[0];
  __syncthreads();
  return total;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) depthwise_weight_kernel(WeightGrad<S> g) {
  SAPWOOD_SHARED(typename Sum<S>::type, shared, kThreads);
  const int64_t taps = g.conv.taps.count;
  for (int64_t work = blockIdx.x; work < g.conv.filters * taps; work += gridDim.x) {
    const int tap = static_cast<int>(work % taps);
    const auto total = sum_over_pixels(g, work / taps, tap, shared);
    if (threadIdx.x == 0) {
      g.weight[work / taps * taps + g.conv.taps.weight[tap]] = static_cast<S>(total);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) bias_kernel(WeightGrad<S> g) {
  SAPWOOD_SHARED(typename Sum<S>::type, shared, kThreads);
  for (int64_t k = blockIdx.x; k < g.conv.filters; k += gridDim.x) {
    const auto total = sum_over_pixels(g, k, -1, shared);
    if (threadIdx.x == 0) g.bias[k] = static_cast<S>(total);
  }
}

template <class S>
void launch_weight_grad(const WeightGrad<S>& g, bool depthwise, Stream stream) {
  const Conv<S>& c = g.conv;
  if (g.weight != nullptr && c.filters * c.channels * c.taps.count > 0) {
    const int64_t lines = (c.channels + kSlice - 1) / kSlice;
    const int64_t blocks = (c.filters + kFilters - 1) / kFilters;
    if (depthwise) {
      auto kernel = depthwise_weight_kernel<S>;
      SAPWOOD_LAUNCH(kernel, grid_of(c.filters * c.taps.count), kThreads, 0, stream, g);
    } else {
      auto kernel = weight_kernel<S>;
      SAPWOOD_LAUNCH(kernel, grid_of(c.taps.count * lines * blocks), kThreads, 0, stream, g);
    }
    SAPWOOD_CUDA_CHECK(cudaGetLastError());
  }
  if (g.bias != nullptr && c.filters > 0) {
    auto kernel = bias_kernel<S>;
    SAPWOOD_LAUNCH(kernel, grid_of(c.filters), kThreads, 0, stream, g);
    SAPWOOD_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace sapwood::copruned_conv::device
