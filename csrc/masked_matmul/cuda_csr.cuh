// y = act(x W^T + b) with W in CSR. A warp owns a row; row_order puts rows of similar length into
// one block, so that its warps end together.
//
//   batch <= 8   lanes walk the row's entries and gather x; the warp sums at the end
//   batch > 8    x is repacked into panels; lanes own batch columns, entries are staged through
//                shared memory 32 at a time and each is one broadcast and one contiguous load
#pragma once

#include "masked_matmul/cuda_common.cuh"

namespace sapwood::masked_matmul::device {

inline constexpr int64_t kGatherBatch = 8;  // up to here lanes gather

template <class V>
struct Csr {
  const V* values;           // (nnz,)
  Columns columns;           // (nnz,)
  const int64_t* row_ptr;    // (N + 1,)
  const int32_t* row_order;  // (N,)
  int64_t n, k;
};

// A batch of at most T.
template <class X, class V, int T>
__global__ void __launch_bounds__(kThreads)
    csr_gather_kernel(Strided<X> x, int64_t batch, Csr<V> w, Epilogue<X> epilogue) {
  using A = Accumulator<X>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp; at < w.n; at += step) {
    const int64_t row = w.row_order[at];
    const int64_t end = w.row_ptr[row + 1];
    A sum[T] = {};
    for (int64_t i = w.row_ptr[row] + lane; i < end; i += kWarp) {
      const A value = static_cast<A>(w.values[i]);
      const int64_t column = w.columns[i];
      SAPWOOD_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t < batch) sum[t] += value * static_cast<A>(x(t, column));
      }
    }
    const A total = reduce_scatter(sum, lane);
    if (lane < T && lane < batch) epilogue.store(lane, row, total);
  }
}

// panels (ceil(B / P), K, P) with P = 32 L: each lane owns L neighbouring batch columns.
template <class X, class V, int L>
__global__ void __launch_bounds__(kThreads)
    csr_panel_kernel(const X* panels, int64_t batch, Csr<V> w, Epilogue<X> epilogue) {
  using A = Accumulator<X>;
  SAPWOOD_SHARED(A, staged_values, kThreads);
  SAPWOOD_SHARED(int32_t, staged_columns, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  A* my_values = staged_values + warp * kWarp;
  int32_t* my_columns = staged_columns + warp * kWarp;
  const int64_t count = panel_count(batch, kWarp * L);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t p = blockIdx.y; p < count; p += gridDim.y) {
    const auto* panel = reinterpret_cast<const Pack<X, L>*>(panels) + p * w.k * kWarp + lane;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp; at < w.n; at += step) {
      const int64_t row = w.row_order[at];
      const int64_t end = w.row_ptr[row + 1];
      A sum[L] = {};
      for (int64_t start = w.row_ptr[row]; start < end; start += kWarp) {
        const int staged = static_cast<int>(smaller<int64_t>(kWarp, end - start));
        __syncwarp();  // the previous entries have been read
        if (lane < staged) {
          my_values[lane] = static_cast<A>(w.values[start + lane]);
          my_columns[lane] = w.columns[start + lane];
        }
        __syncwarp();
        for (int j = 0; j < staged; ++j) {
          const Pack<X, L> xs = panel[static_cast<int64_t>(my_columns[j]) * kWarp];
          SAPWOOD_UNROLL
          for (int l = 0; l < L; ++l) sum[l] += my_values[j] * static_cast<A>(xs.at[l]);
        }
      }
      SAPWOOD_UNROLL
      for (int l = 0; l < L; ++l) {
        const int64_t b = (p * kWarp + lane) * L + l;
        if (b < batch) epilogue.store(b, row, sum[l]);
      }
    }
  }
}

// Batch columns per panel, 0 where the gathering kernel runs.
inline int64_t csr_panel_width(int64_t batch) {
  if (batch <= kGatherBatch) return 0;
  return batch <= kWarp ? kWarp : 2 * kWarp;
}

template <class X, class V, int T>
void launch_csr_gather(Strided<X> x, int64_t batch, const Csr<V>& w, const Epilogue<X>& epilogue,
                       Stream stream) {
  auto kernel = csr_gather_kernel<X, V, T>;
  SAPWOOD_LAUNCH(kernel, grid_x(w.n, kWarps), kThreads, 0, stream, x, batch, w, epilogue);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class X, class V, int L>
void launch_csr_panel(Strided<X> x, X* panels, int64_t batch, const Csr<V>& w,
                      const Epilogue<X>& epilogue, Stream stream) {
  launch_panels<X, kWarp * L>(x, batch, w.k, panels, stream);
  auto kernel = csr_panel_kernel<X, V, L>;
  SAPWOOD_LAUNCH(kernel, dim3(grid_x(w.n, kWarps), grid_y(panel_count(batch, kWarp * L), 1)),
                 kThreads, 0, stream, panels, batch, w, epilogue);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

// `panels` has room for ceil(B / P) * K * P elements, P = csr_panel_width(B).
template <class X, class V>
void launch_csr(Strided<X> x, X* panels, int64_t batch, const Csr<V>& w,
                const Epilogue<X>& epilogue, Stream stream) {
  if (batch == 0 || w.n == 0) return;
  switch (csr_panel_width(batch)) {
    case 0:
      if (batch == 1) return launch_csr_gather<X, V, 1>(x, batch, w, epilogue, stream);
      if (batch <= 4) return launch_csr_gather<X, V, 4>(x, batch, w, epilogue, stream);
      return launch_csr_gather<X, V, 8>(x, batch, w, epilogue, stream);
    case kWarp:
      return launch_csr_panel<X, V, 1>(x, panels, batch, w, epilogue, stream);
    default:
      return launch_csr_panel<X, V, 2>(x, panels, batch, w, epilogue, stream);
  }
}

}  // namespace sapwood::masked_matmul::device
