// log_matmul and its derivatives on the device, term by term: no underflow, no certificate needed.
#pragma once

#include "logsemiring/cuda_common.cuh"

namespace sapwood::logsemiring::device {

struct Shape {
  int64_t batch, m, n, k;
};

// Where the reduction of a tile goes: either the values, or what the gradients need.
template <class T>
struct Reduced {
  T *value, *shift, *weight, *mean;  // (B, M, N) each, null where not wanted
};

// Tiles x[r][l] = from(batch, row0 + r, first + l) of kTile rows, -inf (or 0) outside.
template <class T>
__device__ inline void load_tile(T* tile, const Batched<T>& from, int64_t batch, int64_t row0,
                                 int64_t rows, int64_t first, int64_t terms, T outside) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int64_t r = i / kDepth, l = i % kDepth;
    const bool inside = row0 + r < rows && first + l < terms;
    tile[r * kPitch + l] = inside ? from(batch, row0 + r, first + l) : outside;
  }
}

// One output per thread: three walks over the terms (maximum, sum, and with tangents their mean).
// `b` is the right operand transposed: (B, N, K); likewise its tangent `tb`.
template <class T, bool second>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(Batched<T> a, Batched<T> b, Batched<T> ta, Batched<T> tb, Shape s,
                  Reduced<T> out) {
  SAPWOOD_SHARED(T, left, kTile * kPitch);
  SAPWOOD_SHARED(T, right, kTile * kPitch);
  SAPWOOD_SHARED(T, left_tangent, second ? kTile * kPitch : 1);
  SAPWOOD_SHARED(T, right_tangent, second ? kTile * kPitch : 1);
  const int ty = static_cast<int>(threadIdx.x) / kTile, tx = static_cast<int>(threadIdx.x) % kTile;
  const auto across = static_cast<unsigned>((s.n + kTile - 1) / kTile);
  const unsigned row_tile = blockIdx.x / across, col_tile = blockIdx.x % across;
  const int64_t row0 = int64_t{row_tile} * kTile, col0 = int64_t{col_tile} * kTile;
  for (int64_t batch = blockIdx.y; batch < s.batch; batch += gridDim.y) {
    T top = -infinity<T>(), sum = 0, mean = 0;
    for (int walk = 0; walk < (second ? 3 : 2); ++walk) {
      for (int64_t first = 0; first < s.k; first += kDepth) {
        load_tile(left, a, batch, row0, s.m, first, s.k, -infinity<T>());
        load_tile(right, b, batch, col0, s.n, first, s.k, -infinity<T>());
        if constexpr (second) {
          load_tile(left_tangent, ta, batch, row0, s.m, first, s.k, T(0));
          load_tile(right_tangent, tb, batch, col0, s.n, first, s.k, T(0));
        }
        __syncthreads();
        const int terms = static_cast<int>(s.k - first < kDepth ? s.k - first : kDepth);
        SAPWOOD_ROLLED
        for (int l = 0; l < terms; ++l) {
          const T x = left[ty * kPitch + l] + right[tx * kPitch + l];
          if (walk == 0) top = larger(x, top);
          if (walk == 1) sum += scaled(x, top);
          if constexpr (second) {
            if (walk == 2) {
              mean +=
                  scaled(x, top) * (left_tangent[ty * kPitch + l] + right_tangent[tx * kPitch + l]);
            }
          }
        }
        __syncthreads();
      }
    }
    const int64_t i = row0 + ty, j = col0 + tx;
    if (i >= s.m || j >= s.n) continue;
    const int64_t at = (batch * s.m + i) * s.n + j;
    if (out.value != nullptr) out.value[at] = log_of(top, sum);
    if (out.weight != nullptr) {
      out.shift[at] = top;
      out.weight[at] = inverse(top, sum);
    }
    if constexpr (second) out.mean[at] = mean * inverse(top, sum);
  }
}

// out (B, M, K) = sum_j w_ij p (or w_ij p (ta + tb - mean_ij)) with w = grad weight. The gradient of
// b is the same with everything transposed.
template <class T, bool second>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(Batched<T> a, Batched<T> b, Batched<T> ta, Batched<T> tb, Batched<T> shift,
                    Batched<T> weight, Batched<T> mean, Batched<T> grad, Shape s, T* out,
                    int64_t out_row, int64_t out_col) {
  SAPWOOD_SHARED(T, tops, kTile * kPitch);
  SAPWOOD_SHARED(T, weights, kTile * kPitch);
  SAPWOOD_SHARED(T, right, kTile * kPitch);
  SAPWOOD_SHARED(T, means, second ? kTile * kPitch : 1);
  SAPWOOD_SHARED(T, right_tangent, second ? kTile * kPitch : 1);
  const int ty = static_cast<int>(threadIdx.x) / kTile, tx = static_cast<int>(threadIdx.x) % kTile;
  const auto across = static_cast<unsigned>((s.k + kTile - 1) / kTile);
  const unsigned row_tile = blockIdx.x / across, col_tile = blockIdx.x % across;
  const int64_t i = int64_t{row_tile} * kTile + ty, l = int64_t{col_tile} * kTile + tx;
  const int64_t row0 = i - ty, col0 = l - tx;
  for (int64_t batch = blockIdx.y; batch < s.batch; batch += gridDim.y) {
    const bool inside = i < s.m && l < s.k;
    const T x = inside ? a(batch, i, l) : -infinity<T>();
    T tangent = 0, sum = 0;
    if constexpr (second) tangent = inside ? ta(batch, i, l) : T(0);
    for (int64_t first = 0; first < s.n; first += kDepth) {
      load_tile(tops, shift, batch, row0, s.m, first, s.n, T(0));
      load_tile(weights, weight, batch, row0, s.m, first, s.n, T(0));
      load_tile(right, b, batch, col0, s.k, first, s.n, -infinity<T>());
      if constexpr (second) {
        load_tile(means, mean, batch, row0, s.m, first, s.n, T(0));
        load_tile(right_tangent, tb, batch, col0, s.k, first, s.n, T(0));
      }
      __syncthreads();
      const int terms = static_cast<int>(s.n - first < kDepth ? s.n - first : kDepth);
      SAPWOOD_ROLLED
      for (int j = 0; inside && j < terms; ++j) {
        T p = weights[ty * kPitch + j] * scaled(x + right[tx * kPitch + j], tops[ty * kPitch + j]);
        p *= grad(batch, i, first + j);
        if constexpr (second) {
          p *= tangent + right_tangent[tx * kPitch + j] - means[ty * kPitch + j];
        }
        sum += p;
      }
      __syncthreads();
    }
    if (inside) out[batch * s.m * s.k + i * out_row + l * out_col] = sum;
  }
}

template <class T, bool second>
void launch_reduce(Batched<T> a, Batched<T> b, Batched<T> ta, Batched<T> tb, Shape s,
                   Reduced<T> out, Stream stream) {
  const int64_t blocks = tiles_of(s.m) * tiles_of(s.n);  // below 2^31 for any tensor that exists
  if (s.batch * blocks == 0) return;
  auto kernel = reduce_kernel<T, second>;
  SAPWOOD_LAUNCH(kernel, dim3(grid_of(blocks), batch_grid(s.batch)), kThreads, 0, stream, a, b, ta,
                 tb, s, out);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool second>
void launch_gradient(Batched<T> a, Batched<T> b, Batched<T> ta, Batched<T> tb, Batched<T> shift,
                     Batched<T> weight, Batched<T> mean, Batched<T> grad, Shape s, T* out,
                     int64_t out_row, int64_t out_col, Stream stream) {
  const int64_t blocks = tiles_of(s.m) * tiles_of(s.k);
  if (s.batch * blocks == 0) return;
  auto kernel = gradient_kernel<T, second>;
  SAPWOOD_LAUNCH(kernel, dim3(grid_of(blocks), batch_grid(s.batch)), kThreads, 0, stream, a, b, ta,
                 tb, shift, weight, mean, grad, s, out, out_row, out_col);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::logsemiring::device
