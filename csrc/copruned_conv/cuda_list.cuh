// Lists of kept tiles, made on the device: their length never travels to the host, so that nothing
// waits and a CUDA graph can be replayed with other masks.
#pragma once

#include <cmath>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/launch.h"
#include "copruned_conv/problem.h"

namespace sapwood::copruned_conv::device {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of every kernel here
inline constexpr int kWarps = kThreads / kWarp;

// Half precision is summed in float.
template <class S>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

// Block b lists the entries of mask[b * length, (b + 1) * length) that are on, in order, into
// items[b * length, ...), padded with -1; counts[b] is their number.
static __global__ void __launch_bounds__(kThreads, 1)
    compact_kernel(const bool* mask, int64_t length, int32_t* items, int32_t* counts) {
  SAPWOOD_SHARED(int, warp_counts, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool* row = mask + static_cast<int64_t>(blockIdx.x) * length;
  int32_t* to = items + static_cast<int64_t>(blockIdx.x) * length;
  int64_t found = 0;
  for (int64_t first = 0; first < length; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool on = i < length && row[i];
    const unsigned ballot = __ballot_sync(kFullMask, on);
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    int64_t at = found + __popc(ballot & ((1u << lane) - 1u));
    int64_t all = 0;
    for (int w = 0; w < kWarps; ++w) {
      at += w < warp ? warp_counts[w] : 0;
      all += warp_counts[w];
    }
    if (on) to[at] = static_cast<int32_t>(i);
    found += all;
    __syncthreads();
  }
  for (int64_t i = found + threadIdx.x; i < length; i += kThreads) to[i] = -1;
  if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<int32_t>(found);
}

inline void launch_compact(const bool* mask, int64_t batch, int64_t length, int32_t* items,
                           int32_t* counts, Stream stream) {
  if (batch == 0) return;
  SAPWOOD_LAUNCH(compact_kernel, grid_of(batch), kThreads, 0, stream, mask, length, items, counts);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

// Sizes for the question which tiles of the input an output tile that is on reads.
struct ReadShape {
  int64_t batch, tile_rows, tile_cols;  // of the output
  int64_t out_rows, out_cols, tile;     // of the output
  int64_t input_tile_rows, input_tile_cols, edge;
  Geometry geometry;
};

// Output tiles that may read input rows (or columns) [begin, end): those from first to last.
SAPWOOD_HD inline void readers(const ReadShape& s, int axis, int64_t begin, int64_t end,
                               int64_t* first, int64_t* last) {
  const int64_t reach = s.geometry.dilation[axis] * (s.geometry.kernel[axis] - 1);
  const int64_t stride = s.geometry.stride[axis], padding = s.geometry.padding[axis];
  const int64_t size = axis == 0 ? s.out_rows : s.out_cols;
  const int64_t low = begin + padding - reach, high = end - 1 + padding;
  const int64_t from = low <= 0 ? 0 : (low + stride - 1) / stride;
  const int64_t to = high / stride < size - 1 ? high / stride : size - 1;
  *first = from / s.tile;
  *last = to < from ? *first - 1 : to / s.tile;
}

static __global__ void __launch_bounds__(kThreads, 1)
    read_kernel(const bool* region, ReadShape s, bool* read) {
  const int64_t tiles = s.input_tile_rows * s.input_tile_cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < s.batch * tiles;
       i += step) {
    const int64_t b = i / tiles, y = i % tiles / s.input_tile_cols, x = i % s.input_tile_cols;
    int64_t top, bottom, left, right;
    readers(s, 0, y * s.edge, (y + 1) * s.edge, &top, &bottom);
    readers(s, 1, x * s.edge, (x + 1) * s.edge, &left, &right);
    bool some = false;
    for (int64_t r = top; r <= bottom; ++r) {
      for (int64_t c = left; c <= right; ++c) {
        some |= region[(b * s.tile_rows + r) * s.tile_cols + c];
      }
    }
    read[i] = some;
  }
}

inline void launch_read(const bool* region, const ReadShape& s, bool* read, Stream stream) {
  const int64_t count = s.batch * s.input_tile_rows * s.input_tile_cols;
  if (count == 0) return;
  SAPWOOD_LAUNCH(read_kernel, grid_of((count + kThreads - 1) / kThreads), kThreads, 0, stream,
                 region, s, read);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

// What is computed of an output (batch, rows, cols, channels): tiles and groups, null for all.
struct Kept {
  const bool *region, *channels_on;
  int64_t batch, rows, cols, channels, tile, group;

  SAPWOOD_HD int64_t tile_rows() const { return (rows + tile - 1) / tile; }
  SAPWOOD_HD int64_t tile_cols() const { return (cols + tile - 1) / tile; }
  SAPWOOD_HD bool operator()(int64_t b, int64_t pixel, int64_t channel) const {
    if (channels_on != nullptr && !channels_on[b * (channels / group) + channel / group]) {
      return false;
    }
    if (region == nullptr) return true;
    const int64_t y = pixel / cols / tile, x = pixel % cols / tile;
    return region[(b * tile_rows() + y) * tile_cols() + x];
  }
};

// Zeros, or the residual bit for bit, wherever nothing is computed.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) fill_kernel(Kept kept, const S* residual, S* y) {
  const int64_t pixels = kept.rows * kept.cols, size = kept.batch * pixels * kept.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    const int64_t pixel = i / kept.channels;
    if (kept(pixel / pixels, pixel % pixels, i % kept.channels)) continue;
    y[i] = residual == nullptr ? S(0) : residual[i];
  }
}

template <class S>
void launch_fill(const Kept& kept, const S* residual, S* y, Stream stream) {
  const int64_t size = kept.batch * kept.rows * kept.cols * kept.channels;
  if (size == 0 || (kept.region == nullptr && kept.channels_on == nullptr)) return;
  auto kernel = fill_kernel<S>;
  SAPWOOD_LAUNCH(kernel, grid_of((size + kThreads - 1) / kThreads), kThreads, 0, stream, kept,
                 residual, y);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::copruned_conv::device
