// Maxima, draws, segments and chains on the device.
#pragma once

#include "logsemiring/cuda_matmul.cuh"
#include "logsemiring/philox.h"

namespace sapwood::logsemiring::device {

// One output per thread; NaN wins, then the lowest index.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    max_kernel(Batched<T> a, Batched<T> b, Shape s, T* values, int64_t* indices) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t t = first; t < s.batch * s.m * s.n; t += step) {
    const int64_t batch = t / (s.m * s.n), i = t / s.n % s.m, j = t % s.n;
    T top = -infinity<T>();
    int64_t at = -1;
    for (int64_t l = 0; l < s.k; ++l) {
      const T x = a(batch, i, l) + b(batch, l, j);
      if (x > top || (x != x && top == top)) {
        top = x;
        at = l;
      }
    }
    values[t] = top;
    indices[t] = at;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(Batched<T> a, Batched<T> b, Shape s, int64_t samples, uint64_t key,
                  int64_t* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t t = first; t < samples * s.batch * s.m * s.n; t += step) {
    const int64_t flat = t / (s.m * s.n), i = t / s.n % s.m, j = t % s.n;
    const int64_t batch = flat % s.batch;
    double best = -infinity<double>();
    int64_t at = -1;
    for (int64_t l = 0; l < s.k; ++l) {
      const double x = static_cast<double>(a(batch, i, l)) + static_cast<double>(b(batch, l, j));
      if (!(x > -infinity<double>())) continue;
      const double y = x + gumbel(philox(key, static_cast<uint32_t>(l), static_cast<uint32_t>(j),
                                         static_cast<uint32_t>(i), static_cast<uint32_t>(flat)));
      if (y > best || at < 0) {
        best = y;
        at = l;
      }
    }
    out[t] = at;
  }
}

// x (O, n, I); a warp reduces one segment of one column.
struct Division {
  const int64_t *ptr, *order;
  int64_t outer, count, inner, entries;
};

template <class T>
__device__ inline T warp_max(T v) {
  for (int d = kWarp / 2; d > 0; d /= 2) v = larger(__shfl_xor_sync(kFullMask, v, d), v);
  return v;
}

template <class T>
__device__ inline T warp_sum(T v) {
  for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kFullMask, v, d);
  return v;
}

// `values` (O, S, I) or `weights` (O, n, I), the other null; weights are multiplied by those of
// `scale` (O, S, I) unless that is null.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segment_kernel(const T* x, Division d, const T* scale, T* values, T* weights) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t t = first; t < d.outer * d.count * d.inner; t += warps) {
    const int64_t o = t / (d.count * d.inner), s = t / d.inner % d.count, c = t % d.inner;
    const T* from = x + o * d.entries * d.inner + c;
    T top = -infinity<T>(), sum = 0;
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      top = larger(from[(d.order != nullptr ? d.order[i] : i) * d.inner], top);
    }
    top = warp_max(top);
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      sum += scaled(from[(d.order != nullptr ? d.order[i] : i) * d.inner], top);
    }
    sum = warp_sum(sum);
    if (values != nullptr && lane == 0) values[t] = log_of(top, sum);
    if (weights == nullptr) continue;
    T* to = weights + o * d.entries * d.inner + c;
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      const int64_t at = (d.order != nullptr ? d.order[i] : i) * d.inner;
      const T share = scaled(from[at], top) * inverse(top, sum);
      to[at] = scale != nullptr ? scale[t] * share : share;
    }
  }
}

// t (B, L, k, k) of any strides.
template <class T>
struct Chain {
  const T* data;
  int64_t batch, step, row, col;

  SAPWOOD_HD double operator()(int64_t b, int64_t l, int64_t i, int64_t j) const {
    return static_cast<double>(data[b * batch + l * step + i * row + j * col]);
  }
};

struct ChainShape {
  int64_t batch, length, rows, k;
};

// A block walks one chain; states (B, L + 1, R, k), the first of which is given.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scan_kernel(Chain<T> t, ChainShape s, double* states) {
  const int64_t width = s.rows * s.k;
  for (int64_t b = blockIdx.x; b < s.batch; b += gridDim.x) {
    double* u = states + b * (s.length + 1) * width;
    for (int64_t l = 0; l < s.length; ++l, u += width) {
      for (int64_t e = threadIdx.x; e < width; e += kThreads) {
        const int64_t row = e / s.k * s.k, j = e % s.k;
        double top = -infinity<double>(), sum = 0;
        for (int64_t i = 0; i < s.k; ++i) top = larger(u[row + i] + t(b, l, i, j), top);
        for (int64_t i = 0; i < s.k; ++i) sum += scaled(u[row + i] + t(b, l, i, j), top);
        u[width + e] = log_of(top, sum);
      }
      __syncthreads();
    }
  }
}

// Buffers of the backward walk: gradients of two neighbouring states, maxima and weights (B, 4, R, k).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scan_backward_kernel(Chain<T> t, ChainShape s, const double* states, const double* grad,
                         double* buffers, T* dt, double* dinit) {
  const auto k = static_cast<unsigned>(s.k);  // a step has k * k entries: below 2^32
  const unsigned width = static_cast<unsigned>(s.rows) * k;
  for (int64_t b = blockIdx.x; b < s.batch; b += gridDim.x) {
    double *now = buffers + b * 4 * width, *before = now + width;
    double *tops = before + width, *weights = tops + width;
    const double* given = grad + b * (s.length + 1) * width;
    for (unsigned e = threadIdx.x; e < width; e += kThreads) now[e] = given[s.length * width + e];
    __syncthreads();
    for (int64_t l = s.length - 1; l >= 0; --l) {
      const double* u = states + (b * (s.length + 1) + l) * width;
      for (unsigned e = threadIdx.x; e < width; e += kThreads) {
        const unsigned row = e / k * k, j = e % k;
        double top = -infinity<double>(), sum = 0;
        SAPWOOD_ROLLED
        for (unsigned i = 0; i < k; ++i) top = larger(u[row + i] + t(b, l, i, j), top);
        SAPWOOD_ROLLED
        for (unsigned i = 0; i < k; ++i) sum += scaled(u[row + i] + t(b, l, i, j), top);
        tops[e] = top;
        weights[e] = now[e] == 0 ? 0 : now[e] * inverse(top, sum);
      }
      __syncthreads();
      for (unsigned e = threadIdx.x; e < k * k; e += kThreads) {
        const unsigned i = e / k, j = e % k;
        double total = 0;
        SAPWOOD_ROLLED
        for (unsigned row = 0; row < width; row += k) {
          total += weights[row + j] * scaled(u[row + i] + t(b, l, i, j), tops[row + j]);
        }
        dt[(b * s.length + l) * s.k * s.k + e] = static_cast<T>(total);
      }
      for (unsigned e = threadIdx.x; e < width; e += kThreads) {
        const unsigned row = e / k * k, i = e % k;
        double total = given[l * width + e];
        SAPWOOD_ROLLED
        for (unsigned j = 0; j < k; ++j) {
          total += weights[row + j] * scaled(u[e] + t(b, l, i, j), tops[row + j]);
        }
        before[e] = total;
      }
      __syncthreads();
      double* swapped = now;
      now = before;
      before = swapped;
    }
    for (unsigned e = threadIdx.x; e < width; e += kThreads) dinit[b * width + e] = now[e];
    __syncthreads();
  }
}

}  // namespace sapwood::logsemiring::device
