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

// With p the probabilities: means (O, S, I) of the tangent over each segment, and
// out (O, n, I) = grad p (tangent - mean).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segment_second_kernel(const T* x, const T* tangent, Division d, const T* grad, T* means,
                          T* out) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t t = first; t < d.outer * d.count * d.inner; t += warps) {
    const int64_t o = t / (d.count * d.inner), s = t / d.inner % d.count, c = t % d.inner;
    const int64_t column = o * d.entries * d.inner + c;
    T top = -infinity<T>(), sum = 0, mean = 0;
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      top = larger(x[column + (d.order != nullptr ? d.order[i] : i) * d.inner], top);
    }
    top = warp_max(top);
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      const int64_t at = column + (d.order != nullptr ? d.order[i] : i) * d.inner;
      sum += scaled(x[at], top);
      mean += scaled(x[at], top) * tangent[at];
    }
    sum = warp_sum(sum);
    const T weight = inverse(top, sum);
    mean = warp_sum(mean) * weight;
    if (lane == 0) means[t] = mean;
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      const int64_t at = column + (d.order != nullptr ? d.order[i] : i) * d.inner;
      out[at] = grad[t] * (scaled(x[at], top) * weight) * (tangent[at] - mean);
    }
  }
}

// A maximum and which entry it is: NaN wins, then the first entry.
template <class T>
struct Place {
  T top;
  int64_t at;

  SAPWOOD_HD void meet(T x, int64_t i) {
    const bool nan = x != x, known = top != top;
    const bool ties = at >= 0 && i < at && (x == top || (nan && known));
    if (i >= 0 && (ties || (nan && !known) || x > top)) {
      top = x;
      at = i;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segment_max_kernel(const T* x, Division d, T* values, int64_t* indices) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t t = first; t < d.outer * d.count * d.inner; t += warps) {
    const int64_t o = t / (d.count * d.inner), s = t / d.inner % d.count, c = t % d.inner;
    const T* from = x + o * d.entries * d.inner + c;
    Place<T> best{-infinity<T>(), -1};
    for (int64_t i = d.ptr[s] + lane; i < d.ptr[s + 1]; i += kWarp) {
      const int64_t entry = d.order != nullptr ? d.order[i] : i;
      best.meet(from[entry * d.inner], entry);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const T top = __shfl_xor_sync(kFullMask, best.top, step);
      const int64_t at = __shfl_xor_sync(kFullMask, best.at, step);
      best.meet(top, at);
    }
    if (lane == 0) {
      values[t] = best.top;
      indices[t] = best.at;
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
  bool maximum;
};

// The first i of largest u[i] + t_ij, -1 where all are -inf; NaN wins.
template <class T>
__device__ inline Place<double> largest_term(const double* u, const Chain<T>& t, int64_t b,
                                             int64_t l, int64_t k, int64_t j) {
  Place<double> best{-infinity<double>(), -1};
  SAPWOOD_ROLLED
  for (int64_t i = 0; i < k; ++i) best.meet(u[i] + t(b, l, i, j), i);
  return best;
}

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
        if (s.maximum) {
          u[width + e] = largest_term(u + row, t, b, l, s.k, j).top;
          continue;
        }
        double top = -infinity<double>(), sum = 0;
        for (int64_t i = 0; i < s.k; ++i) top = larger(u[row + i] + t(b, l, i, j), top);
        for (int64_t i = 0; i < s.k; ++i) sum += scaled(u[row + i] + t(b, l, i, j), top);
        u[width + e] = log_of(top, sum);
      }
      __syncthreads();
    }
  }
}

// What entry i of a step gets of an output: a share by its size, or all at the maximum, whose place is
// kept instead of the maximum itself.
SAPWOOD_HD inline double share_of(bool maximum, double weight, double top, double x, unsigned i) {
  if (maximum) return top == i ? weight : 0;
  return weight * scaled(x, top);
}

// Buffers of the backward walk: gradients of two neighbouring states, maxima and weights (B, 4, R, k).
// A thread alone writes and reads its entries of the gradients; maxima and weights are read by all.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scan_backward_kernel(Chain<T> t, ChainShape s, const double* states, const double* grad,
                         double* buffers, T* dt, double* dinit) {
  const auto k = static_cast<unsigned>(s.k);  // cuda.cu refuses steps of 2^32 entries
  const unsigned width = static_cast<unsigned>(s.rows) * k;
  for (int64_t b = blockIdx.x; b < s.batch; b += gridDim.x) {
    double *now = buffers + b * 4 * width, *before = now + width;
    double *tops = before + width, *weights = tops + width;
    const double* given = grad + b * (s.length + 1) * width;
    for (unsigned e = threadIdx.x; e < width; e += kThreads) now[e] = given[s.length * width + e];
    for (int64_t l = s.length - 1; l >= 0; --l) {
      const double* u = states + (b * (s.length + 1) + l) * width;
      for (unsigned e = threadIdx.x; e < width; e += kThreads) {
        const unsigned row = e / k * k, j = e % k;
        if (s.maximum) {
          tops[e] = static_cast<double>(largest_term(u + row, t, b, l, s.k, j).at);
          weights[e] = now[e];
          continue;
        }
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
          total +=
              share_of(s.maximum, weights[row + j], tops[row + j], u[row + i] + t(b, l, i, j), i);
        }
        dt[(b * s.length + l) * s.k * s.k + e] = static_cast<T>(total);
      }
      for (unsigned e = threadIdx.x; e < width; e += kThreads) {
        const unsigned row = e / k * k, i = e % k;
        double total = given[l * width + e];
        SAPWOOD_ROLLED
        for (unsigned j = 0; j < k; ++j) {
          total += share_of(s.maximum, weights[row + j], tops[row + j], u[e] + t(b, l, i, j), i);
        }
        before[e] = total;
      }
      __syncthreads();
      double* swapped = now;
      now = before;
      before = swapped;
    }
    for (unsigned e = threadIdx.x; e < width; e += kThreads) dinit[b * width + e] = now[e];
  }
}

// One place of a path, from x[i] + y(i): see cpu_path.h.
template <class F>
__device__ inline int64_t path_place(const double* u, const F& other, int64_t k, bool maximum,
                                     uint64_t key, int64_t step, int64_t path) {
  Place<double> best{-infinity<double>(), -1};
  SAPWOOD_ROLLED
  for (int64_t i = 0; i < k; ++i) {
    const double x = u[i] + other(i);
    if (maximum) {
      best.meet(x, i);
      continue;
    }
    if (!(x > -infinity<double>())) continue;
    const double score =
        x + gumbel(philox(key, static_cast<uint32_t>(i), 0, static_cast<uint32_t>(step),
                          static_cast<uint32_t>(path)));
    if (score > best.top || best.at < 0) best = {score, i};
  }
  return best.at;
}

// A thread walks one path back: t (B, L, k, k), states (B, L + 1, k), end (B, k), out (S, B, L + 1).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    path_kernel(Chain<T> t, ChainShape s, const double* states, const double* end, int64_t samples,
                uint64_t key, int64_t* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t p = first; p < samples * s.batch; p += stride) {
    const int64_t b = p % s.batch;
    const double* u = states + b * (s.length + 1) * s.k;
    int64_t* path = out + p * (s.length + 1);
    int64_t state = path_place(
        u + s.length * s.k, [&](int64_t i) { return end[b * s.k + i]; }, s.k, s.maximum, key,
        s.length, p);
    path[s.length] = state;
    for (int64_t l = s.length - 1; l >= 0; --l) {
      if (state >= 0) {
        const int64_t j = state;
        state = path_place(
            u + l * s.k, [&](int64_t i) { return t(b, l, i, j); }, s.k, s.maximum, key, l, p);
      }
      path[l] = state;
    }
  }
}

}  // namespace sapwood::logsemiring::device
