// Forward on the device: a block owns a tile, a thread two of its pixels; Gaussians pass through
// shared memory in the order of their ids. And pixels counted.
#pragma once

#include "splat2d/cuda_tiles.cuh"

namespace sapwood::splat2d::device {

inline constexpr int kRoundIds = kThreads * kWarp;  // a round reads one word of the list per thread

// What a pixel needs of the Gaussians of a stage.
template <class T, int C>
struct Stage {
  T mx[kThreads], my[kThreads], per_x[kThreads], per_y[kThreads], skew[kThreads], limit[kThreads];
  T feat[C][kThreads];
};

// Writes the positions of the set bits of a round in ascending order; returns how many there are.
// Every thread holds one word. `totals` has one element per warp.
__device__ inline int list_bits(uint32_t bits, uint16_t* queue, int* totals) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int own = __popc(bits);
  int before = own;  // inclusive sum over the warp
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullMask, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarp - 1) totals[warp] = before;
  __syncthreads();
  int at = before - own, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) at += totals[w];
    total += totals[w];
  }
  for (; bits != 0; bits &= bits - 1) {
    const int bit = __popc((bits & (~bits + 1)) - 1);  // the lowest
    queue[at++] = static_cast<uint16_t>(static_cast<int>(threadIdx.x) * kWarp + bit);
  }
  __syncthreads();
  return total;
}

template <class T, int C>
__device__ void add_stage(const Stage<T, C>& stage, int count, T x, T y, T (&sum)[C]) {
  for (int i = 0; i < count; ++i) {
    const T u = (x - stage.mx[i]) * stage.per_x[i];
    const T v = (y - stage.my[i]) * stage.per_y[i] - stage.skew[i] * u;
    const T q = u * u + v * v;
    if (!(q <= stage.limit[i])) continue;
    const T w = power_of_two(-q);
    SAPWOOD_UNROLL
    for (int c = 0; c < C; ++c) sum[c] += w * stage.feat[c][i];
  }
}

// Channels [channel, channel + C) of the tiles of a slab.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const Gaussian<T>* gaussians, const T* feat, const uint32_t* lists, Shape s,
                Slab slab, int64_t channel, T* image) {
  SAPWOOD_SHARED(uint16_t, queue, kRoundIds);
  SAPWOOD_SHARED(int, totals, kWarps);
  using Staged = Stage<T, C>;
  SAPWOOD_SHARED(Staged, stage, 1);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t at = blockIdx.x; at < slab.count; at += gridDim.x) {
    const int64_t tile = slab.first + at, b = tile / s.tiles(), in_image = tile % s.tiles();
    const int64_t x = in_image % s.tiles_x() * kTile + thread % kTile;
    const int64_t y = in_image / s.tiles_x() * kTile + thread / kTile;
    constexpr int64_t below = kThreads / kTile;  // from a thread's first pixel to its second
    const uint32_t* list = lists + at * s.words();
    T sums[2][C] = {};
    for (int64_t word = 0; word < s.words(); word += kThreads) {
      const uint32_t bits = word + thread < s.words() ? list[word + thread] : 0u;
      const int listed = list_bits(bits, queue, totals);
      for (int first = 0; first < listed; first += kThreads) {
        if (first + thread < listed) {
          const int64_t i = b * s.n + word * kWarp + queue[first + thread];
          const Gaussian<T>& g = gaussians[i];
          stage->mx[thread] = g.mx;
          stage->my[thread] = g.my;
          stage->per_x[thread] = g.per_x;
          stage->per_y[thread] = g.per_y;
          stage->skew[thread] = g.skew;
          stage->limit[thread] = g.limit;
          for (int c = 0; c < C; ++c) stage->feat[c][thread] = feat[i * s.channels + channel + c];
        }
        __syncthreads();
        const int count = listed - first < kThreads ? listed - first : kThreads;
        add_stage<T, C>(*stage, count, static_cast<T>(x), static_cast<T>(y), sums[0]);
        add_stage<T, C>(*stage, count, static_cast<T>(x), static_cast<T>(y + below), sums[1]);
        __syncthreads();
      }
    }
    if (x >= s.width) continue;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = y + half * below;
      if (row >= s.height) break;
      for (int c = 0; c < C; ++c) {
        image[((b * s.channels + channel + c) * s.height + row) * s.width + x] = sums[half][c];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_pixels_kernel(const Gaussian<T>* gaussians, Shape s, int64_t* totals) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       i < s.batch * s.n; i += step) {
    const Gaussian<T> g = gaussians[i];
    int64_t found = 0;
    for (int64_t y = g.top; y < g.bottom; ++y) {
      int64_t first, last;
      columns_of_row(g, y, s.width, first, last);
      for (int64_t x = first + lane; x <= last; x += kWarp) {
        const T u = (static_cast<T>(x) - g.mx) * g.per_x;
        const T v = (static_cast<T>(y) - g.my) * g.per_y - g.skew * u;
        found += u * u + v * v <= g.limit;
      }
    }
    if (found != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(totals + i / s.n),
                static_cast<unsigned long long>(found));
    }
  }
}

template <class T, int C>
void launch_draw_channels(const Gaussian<T>* gaussians, const T* feat, const uint32_t* lists,
                          const Shape& s, const Slab& slab, int64_t channel, T* image,
                          Stream stream) {
  auto kernel = draw_kernel<T, C>;
  const auto grid = static_cast<unsigned>(slab.count < 0x7fffffff ? slab.count : 0x7fffffff);
  SAPWOOD_LAUNCH(kernel, grid, kThreads, 0, stream, gaussians, feat, lists, s, slab, channel,
                 image);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

// Four channels at a time, and what remains.
template <class T>
void launch_draw(const Gaussian<T>* gaussians, const T* feat, const uint32_t* lists, const Shape& s,
                 const Slab& slab, T* image, Stream stream) {
  for (int64_t channel = 0; channel < s.channels; channel += 4) {
    switch (s.channels - channel) {
      case 1:
        launch_draw_channels<T, 1>(gaussians, feat, lists, s, slab, channel, image, stream);
        break;
      case 2:
        launch_draw_channels<T, 2>(gaussians, feat, lists, s, slab, channel, image, stream);
        break;
      case 3:
        launch_draw_channels<T, 3>(gaussians, feat, lists, s, slab, channel, image, stream);
        break;
      default:
        launch_draw_channels<T, 4>(gaussians, feat, lists, s, slab, channel, image, stream);
    }
  }
}

template <class T>
void launch_count_pixels(const Gaussian<T>* gaussians, const Shape& s, int64_t* totals,
                         Stream stream) {
  auto kernel = count_pixels_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(s.batch * s.n * kWarp), kThreads, 0, stream, gaussians, s, totals);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::splat2d::device
