// dvalues = (grad^T x) at the kept positions only: one dot product of length B per entry. A warp
// owns a row.
//
//   batch <= 8   each lane takes an entry and walks the batch
//   batch > 8    grad and x are repacked into panels of 32; lanes own batch columns, 32 entries are
//                accumulated at once and summed over the lanes together
#pragma once

#include "masked_matmul/cuda_common.cuh"

namespace sapwood::masked_matmul::device {

inline constexpr int64_t kLaneBatch = 8;  // up to here a lane walks the batch

struct Structure {
  Columns columns;         // (nnz,)
  const int64_t* row_ptr;  // (N + 1,)
  int64_t n, k;
};

template <class X>
__global__ void __launch_bounds__(kThreads)
    sampled_lane_kernel(Strided<X> grad, Strided<X> x, int64_t batch, Structure w, X* out) {
  using A = Accumulator<X>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < w.n; row += step) {
    const int64_t end = w.row_ptr[row + 1];
    for (int64_t i = w.row_ptr[row] + lane; i < end; i += kWarp) {
      const int64_t column = w.columns[i];
      A sum = A(0);
      for (int64_t b = 0; b < batch; ++b) {
        sum += static_cast<A>(grad(b, row)) * static_cast<A>(x(b, column));
      }
      out[i] = static_cast<X>(sum);
    }
  }
}

// grad panels (ceil(B / 32), N, 32), x panels (ceil(B / 32), K, 32)
template <class X>
__global__ void __launch_bounds__(kThreads)
    sampled_panel_kernel(const X* grad, const X* x, int64_t batch, Structure w, X* out) {
  using A = Accumulator<X>;
  SAPWOOD_SHARED(int32_t, staged_columns, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t* my_columns = staged_columns + warp * kWarp;
  const int64_t panels = panel_count(batch, kWarp);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < w.n; row += step) {
    const int64_t end = w.row_ptr[row + 1];
    for (int64_t start = w.row_ptr[row]; start < end; start += kWarp) {
      const int staged = static_cast<int>(smaller<int64_t>(kWarp, end - start));
      __syncwarp();  // the previous columns have been read
      if (lane < staged) my_columns[lane] = w.columns[start + lane];
      __syncwarp();
      A sum[kWarp] = {};
      for (int64_t p = 0; p < panels; ++p) {
        const A g = static_cast<A>(grad[(p * w.n + row) * kWarp + lane]);
        const X* panel = x + p * w.k * kWarp + lane;
        SAPWOOD_UNROLL
        for (int j = 0; j < kWarp; ++j) {
          if (j < staged) {
            sum[j] += g * static_cast<A>(panel[static_cast<int64_t>(my_columns[j]) * kWarp]);
          }
        }
      }
      const A total = reduce_scatter(sum, lane);
      if (lane < staged) out[start + lane] = static_cast<X>(total);
    }
  }
}

// Panels are needed above kLaneBatch: room for ceil(B / 32) * 32 * N and ... * K elements.
template <class X>
void launch_sampled(Strided<X> grad, Strided<X> x, X* grad_panels, X* x_panels, int64_t batch,
                    const Structure& w, X* out, Stream stream) {
  if (w.n == 0) return;
  if (batch <= kLaneBatch) {
    auto kernel = sampled_lane_kernel<X>;
    SAPWOOD_LAUNCH(kernel, grid_x(w.n, kWarps), kThreads, 0, stream, grad, x, batch, w, out);
  } else {
    launch_panels<X, kWarp>(grad, batch, w.n, grad_panels, stream);
    launch_panels<X, kWarp>(x, batch, w.k, x_panels, stream);
    auto kernel = sampled_panel_kernel<X>;
    SAPWOOD_LAUNCH(kernel, grid_x(w.n, kWarps), kThreads, 0, stream, grad_panels, x_panels, batch,
                   w, out);
  }
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::masked_matmul::device
