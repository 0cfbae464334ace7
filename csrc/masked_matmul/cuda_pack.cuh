// Building the packed formats: kept entries per row, values with columns or bitmap words, the order
// of the rows, and the transposed structure. Counting and sorting of whole vectors is torch's.
#pragma once

#include "masked_matmul/cuda_common.cuh"

namespace sapwood::masked_matmul::device {

inline constexpr int kOrderChunk = 128;  // rows are ordered by length inside chunks of this size
static_assert(kOrderChunk == kThreads);

// counts (N + 1,): 0, then the kept entries of each row. One warp per row.
template <class = void>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Strided<uint8_t> mask, int64_t n, int64_t k, int64_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (blockIdx.x == 0 && threadIdx.x == 0) counts[0] = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < n; row += step) {
    int64_t kept[1] = {0};
    for (int64_t c = lane; c < k; c += kWarp) kept[0] += mask(row, c) != 0;
    const int64_t total = reduce_scatter(kept, lane);
    if (lane == 0) counts[row + 1] = total;
  }
}

// Where a packed row goes: columns for CSR, or words (N, ceil(K / 16)) for the bitmap.
struct PackTarget {
  WritableColumns columns;
  uint16_t* words;
  int64_t words_per_row;
};

// Writes values and either columns or words. One warp per row, 32 columns at a time: a lane's place
// is the number of kept lanes below it.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Strided<Bits> weight, Strided<uint8_t> mask, const int64_t* row_ptr, int64_t n,
                int64_t k, Bits* values, PackTarget target) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < n; row += step) {
    int64_t next = row_ptr[row];
    for (int64_t c0 = 0; c0 < k; c0 += kWarp) {
      const int64_t c = c0 + lane;
      const bool kept = c < k && mask(row, c) != 0;
      const unsigned votes = __ballot_sync(kFullMask, kept);
      const int64_t place = next + __popc(votes & ((1u << lane) - 1u));
      if (kept) {
        values[place] = weight(row, c);
        if (!target.words) target.columns.set(place, c);
      }
      const int64_t word = c0 / 16 + lane;
      if (target.words && lane < 2 && word < target.words_per_row) {
        target.words[row * target.words_per_row + word] =
            static_cast<uint16_t>(lane == 0 ? votes : votes >> 16);
      }
      next += __popc(votes);
    }
  }
}

// row_order (N,): the rows of each chunk, longest first, equal ones by index. One block per chunk.
template <class = void>
__global__ void __launch_bounds__(kThreads)
    row_order_kernel(const int64_t* row_ptr, int64_t n, int32_t* row_order) {
  SAPWOOD_SHARED(int64_t, length, kOrderChunk);
  const int me = static_cast<int>(threadIdx.x);
  const int64_t chunks = (n + kOrderChunk - 1) / kOrderChunk;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t row = chunk * kOrderChunk + me;
    length[me] = row < n ? row_ptr[row + 1] - row_ptr[row] : -1;
    __syncthreads();
    if (row < n) {
      int rank = 0;
      for (int other = 0; other < kOrderChunk; ++other) {
        rank += length[other] > length[me] || (length[other] == length[me] && other < me);
      }
      row_order[chunk * kOrderChunk + rank] = static_cast<int32_t>(row);
    }
    __syncthreads();
  }
}

// Columns as int32, the keys of the sort.
template <class = void>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(Columns columns, int64_t nnz, int32_t* keys) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < nnz; i += step) {
    keys[i] = columns[i];
  }
}

// The first position in the ascending `data` whose value is not below `wanted`.
template <class T>
SAPWOOD_HD int64_t lower_bound(const T* data, int64_t count, T wanted) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (data[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// From columns sorted stably (`sorted`, with `perm` their old places): the rows of the transposed
// entries and the starts of the transposed rows.
template <class = void>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const int32_t* sorted, const int64_t* perm, int64_t nnz,
                     const int64_t* row_ptr, int64_t n, int64_t k, WritableColumns columns_t,
                     int64_t* row_ptr_t) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < nnz; i += step) {
    columns_t.set(i, lower_bound(row_ptr, n + 1, perm[i] + 1) - 1);
  }
  for (int64_t c = thread; c <= k; c += step) {
    row_ptr_t[c] = lower_bound(sorted, nnz, static_cast<int32_t>(c));
  }
}

inline void launch_count(Strided<uint8_t> mask, int64_t n, int64_t k, int64_t* counts,
                         Stream stream) {
  auto kernel = count_kernel<>;
  SAPWOOD_LAUNCH(kernel, std::max(1u, grid_x(n, kWarps)), kThreads, 0, stream, mask, n, k, counts);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class Bits>
void launch_pack(Strided<Bits> weight, Strided<uint8_t> mask, const int64_t* row_ptr, int64_t n,
                 int64_t k, Bits* values, PackTarget target, Stream stream) {
  if (n == 0 || k == 0) return;
  auto kernel = pack_kernel<Bits>;
  SAPWOOD_LAUNCH(kernel, grid_x(n, kWarps), kThreads, 0, stream, weight, mask, row_ptr, n, k,
                 values, target);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_row_order(const int64_t* row_ptr, int64_t n, int32_t* row_order, Stream stream) {
  if (n == 0) return;
  auto kernel = row_order_kernel<>;
  SAPWOOD_LAUNCH(kernel, grid_x(n, kOrderChunk), kThreads, 0, stream, row_ptr, n, row_order);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_widen(Columns columns, int64_t nnz, int32_t* keys, Stream stream) {
  if (nnz == 0) return;
  auto kernel = widen_kernel<>;
  SAPWOOD_LAUNCH(kernel, grid_x(nnz, kThreads), kThreads, 0, stream, columns, nnz, keys);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_transpose(const int32_t* sorted, const int64_t* perm, int64_t nnz,
                             const int64_t* row_ptr, int64_t n, int64_t k,
                             WritableColumns columns_t, int64_t* row_ptr_t, Stream stream) {
  auto kernel = transpose_kernel<>;
  SAPWOOD_LAUNCH(kernel, grid_x(std::max(nnz, k + 1), kThreads), kThreads, 0, stream, sorted, perm,
                 nnz, row_ptr, n, k, columns_t, row_ptr_t);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::masked_matmul::device
