// Gaussians prepared on the device, and which of them each tile of the image can see.
//
// A tile's list is one bit per Gaussian: setting bits commutes, so the lists do not depend on the
// order of threads, nothing has to be sorted, and reading the bits in order gives ascending ids. Their
// size follows from the shapes alone, so nothing is read back and a call can be captured in a graph.
// Where all lists together would be large, the image is drawn in slabs of tiles.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "splat2d/geometry.h"

namespace sapwood::splat2d::device {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of every kernel here
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kTile = 16;  // side of a tile in pixels

// Sizes of a batch of images.
struct Shape {
  int64_t batch, n, channels, height, width;

  SAPWOOD_HD int64_t tiles_x() const { return (width + kTile - 1) / kTile; }
  SAPWOOD_HD int64_t tiles() const { return (height + kTile - 1) / kTile * tiles_x(); }
  SAPWOOD_HD int64_t words() const { return (n + kWarp - 1) / kWarp; }  // of a tile's list
};

// Consecutive tiles [first, first + count) of the batch.
struct Slab {
  int64_t first, count;
};

__device__ inline float power_of_two(float x) {
  return exp2f(x);
}
__device__ inline double power_of_two(double x) {
  return exp2(x);
}
__device__ inline float root(float x) {
  return sqrtf(x);
}
__device__ inline double root(double x) {
  return sqrt(x);
}

// The columns [first, last] of row y that can be reached, inside the image; first > last: none.
template <class T>
__device__ void columns_of_row(const Gaussian<T>& g, int64_t y, int64_t width, int64_t& first,
                               int64_t& last) {
  first = 0;
  last = width - 1;
  if (g.extreme) return;
  const T e = (static_cast<T>(y) - g.my) * g.per_y, d = g.reach - e * e;
  const T middle = g.mx + g.stretch * (g.skew * e), end = static_cast<T>(width - 1);
  const T half = g.stretch * root(d > T(0) ? d : T(0)) + g.margin;
  const T low = middle - half, high = middle + half;
  if (!(d >= T(0)) || !(low <= end) || !(high >= T(0))) {
    last = -1;
    return;
  }
  if (low > T(0)) first = static_cast<int64_t>(low);
  if (high < end) last = static_cast<int64_t>(high);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const T* mu, const T* chol, const int64_t* counts, int64_t counts_stride,
                   Shape s, Cut cut, Gaussian<T>* to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < s.batch * s.n;
       i += step) {
    const bool exists = counts == nullptr || i % s.n < counts[i / s.n * counts_stride];
    to[i] = exists ? prepare(mu + 2 * i, chol + 3 * i, s.height, s.width, cut) : Gaussian<T>{};
  }
}

// Sets the bit of every Gaussian in the lists (slab.count, words) of the tiles that it can reach.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const Gaussian<T>* gaussians, Shape s, Slab slab, uint32_t* lists) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < s.batch * s.n;
       i += step) {
    const Gaussian<T> g = gaussians[i];
    const int64_t item = i / s.n * s.tiles() - slab.first, id = i % s.n;
    if (item >= slab.count || item + s.tiles() <= 0) continue;
    for (int64_t top = g.top / kTile * kTile; top < g.bottom; top += kTile) {
      const int64_t row = item + top / kTile * s.tiles_x();
      if (row >= slab.count || row + s.tiles_x() <= 0) continue;
      int64_t first = s.width, last = -1;
      for (int64_t y = top < g.top ? g.top : top; y < g.bottom && y < top + kTile; ++y) {
        int64_t from, to;
        columns_of_row(g, y, s.width, from, to);
        if (from > to) continue;
        if (from < first) first = from;
        if (to > last) last = to;
      }
      for (int64_t x = first / kTile; x <= last / kTile && first <= last; ++x) {
        const int64_t tile = row + x;
        if (tile < 0 || tile >= slab.count) continue;
        // Every bit is set once, so adding it is setting it.
        atomicAdd(lists + tile * s.words() + id / kWarp, uint32_t{1} << (id % kWarp));
      }
    }
  }
}

inline unsigned grid_of(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

template <class T>
void launch_prepare(const T* mu, const T* chol, const int64_t* counts, int64_t counts_stride,
                    const Shape& s, const Cut& cut, Gaussian<T>* to, Stream stream) {
  auto kernel = prepare_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(s.batch * s.n), kThreads, 0, stream, mu, chol, counts,
                 counts_stride, s, cut, to);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_mark(const Gaussian<T>* gaussians, const Shape& s, const Slab& slab, uint32_t* lists,
                 Stream stream) {
  auto kernel = mark_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(s.batch * s.n), kThreads, 0, stream, gaussians, s, slab, lists);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::splat2d::device
