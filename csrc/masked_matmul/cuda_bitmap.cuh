// y = act(x W^T + b) with W as bitmap and values. A warp owns four rows and walks 64 columns at a
// time; lane l owns columns 2l and 2l + 1 of them. The place of a lane's first value is the row's
// position plus the number of set bits below 2l, so decoding costs two population counts and at
// most two loads, which are contiguous over the warp. The four rows share the loads of x.
#pragma once

#include "masked_matmul/cuda_common.cuh"

namespace sapwood::masked_matmul::device {

inline constexpr int kBitmapRows = 4;        // rows per warp
inline constexpr int64_t kWordsPerStep = 4;  // 16-bit words, 64 columns

template <class V>
struct Bitmap {
  const V* values;         // (nnz,)
  const uint16_t* words;   // (N, ceil(K / 16))
  const int64_t* row_ptr;  // (N + 1,)
  int64_t n, k, words_per_row;
  bool aligned;  // the words of every step start at a multiple of eight bytes
};

// Four words of a row as one bit vector, zero past the row's end.
__device__ inline uint64_t load_bits(const uint16_t* words, int64_t left, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint64_t*>(words);
  uint64_t bits = 0;
  SAPWOOD_UNROLL
  for (int j = 0; j < kWordsPerStep; ++j) {
    if (j < left) bits |= static_cast<uint64_t>(words[j]) << (16 * j);
  }
  return bits;
}

// T batch entries at a time; a thread keeps rows x T sums in registers.
template <class X, class V, int T>
__global__ void __launch_bounds__(kThreads)
    bitmap_kernel(Strided<X> x, int64_t batch, Bitmap<V> w, Epilogue<X> epilogue) {
  using A = Accumulator<X>;
  constexpr int R = kBitmapRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint64_t below = (uint64_t{1} << (2 * lane)) - 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * R;
  for (int64_t b0 = static_cast<int64_t>(blockIdx.y) * T; b0 < batch;
       b0 += static_cast<int64_t>(gridDim.y) * T) {
    for (int64_t row0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * R; row0 < w.n;
         row0 += step) {
      A sum[R * T] = {};
      int64_t next[R];
      SAPWOOD_UNROLL
      for (int r = 0; r < R; ++r) next[r] = row0 + r < w.n ? w.row_ptr[row0 + r] : 0;
      for (int64_t word = 0; word < w.words_per_row; word += kWordsPerStep) {
        const int64_t column = word * 16 + 2 * lane;
        A xs[T][2];
        SAPWOOD_UNROLL
        for (int t = 0; t < T; ++t) {
          SAPWOOD_UNROLL
          for (int j = 0; j < 2; ++j) {
            const bool inside = b0 + t < batch && column + j < w.k;
            xs[t][j] = inside ? static_cast<A>(x(b0 + t, column + j)) : A(0);
          }
        }
        SAPWOOD_UNROLL
        for (int r = 0; r < R; ++r) {
          if (row0 + r >= w.n) continue;
          const uint64_t bits = load_bits(w.words + (row0 + r) * w.words_per_row + word,
                                          w.words_per_row - word, w.aligned);
          const unsigned mine = static_cast<unsigned>(bits >> (2 * lane)) & 3u;
          const int64_t place = next[r] + __popcll(bits & below);
          if (mine & 1u) {  // an absent entry is skipped: 0 * inf would be NaN
            const A value = static_cast<A>(w.values[place]);
            SAPWOOD_UNROLL
            for (int t = 0; t < T; ++t) sum[r * T + t] += value * xs[t][0];
          }
          if (mine & 2u) {
            const A value = static_cast<A>(w.values[place + (mine & 1u)]);
            SAPWOOD_UNROLL
            for (int t = 0; t < T; ++t) sum[r * T + t] += value * xs[t][1];
          }
          next[r] += __popcll(bits);
        }
      }
      const A total = reduce_scatter(sum, lane);
      const int64_t row = row0 + lane / T;
      const int64_t b = b0 + lane % T;
      if (lane < R * T && row < w.n && b < batch) epilogue.store(b, row, total);
    }
  }
}

template <class X, class V, int T>
void launch_bitmap_tile(Strided<X> x, int64_t batch, const Bitmap<V>& w,
                        const Epilogue<X>& epilogue, Stream stream) {
  auto kernel = bitmap_kernel<X, V, T>;
  SAPWOOD_LAUNCH(kernel, dim3(grid_x(w.n, kWarps * kBitmapRows), grid_y(batch, T)), kThreads, 0,
                 stream, x, batch, w, epilogue);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class X, class V>
void launch_bitmap(Strided<X> x, int64_t batch, const Bitmap<V>& w, const Epilogue<X>& epilogue,
                   Stream stream) {
  if (batch == 0 || w.n == 0) return;
  if (batch == 1) return launch_bitmap_tile<X, V, 1>(x, batch, w, epilogue, stream);
  if (batch <= 4) return launch_bitmap_tile<X, V, 4>(x, batch, w, epilogue, stream);
  return launch_bitmap_tile<X, V, 8>(x, batch, w, epilogue, stream);
}

}  // namespace sapwood::masked_matmul::device
