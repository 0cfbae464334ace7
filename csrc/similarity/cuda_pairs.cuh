// Pairs that reach a threshold, and clusters of them. One pass writes what fits the buffer and counts
// the rest by row; the caller runs a second one with an exact buffer where it was too small. The
// order of the pairs is made by a sort afterwards, so that the atomics do not show.
#pragma once

#include "similarity/cuda_tile.cuh"

namespace sapwood::similarity::device {

// A pair as one number that sorts by row, then by column; N and M are below 2^31, so 63 bits hold it.
SAPWOOD_HD inline int64_t key_of(int64_t row, int64_t column, int64_t columns) {
  return row * columns + column;
}
SAPWOOD_HD inline int64_t row_of(int64_t key, int64_t columns) {
  return key / columns;
}
SAPWOOD_HD inline int64_t column_of(int64_t key, int64_t columns) {
  return key % columns;
}

// keys (capacity,) see key_of; counts (N,) pairs of each row; found () pairs of rows < row_limit.
template <class T>
struct PairSink {
  int64_t* keys;
  T* values;
  int64_t capacity;
  int64_t row_limit;
  unsigned long long* counts;
  unsigned long long* found;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pairs_kernel(Search<T> s, double threshold, PairSink<T> sink) {
  SAPWOOD_SHARED(T, left, kDepth * kPitch);
  SAPWOOD_SHARED(T, right, kDepth * kPitch);
  SAPWOOD_SHARED(T, products, kTile * kPitch);
  const Tiles tiles = Tiles::of(s);
  for (int64_t t = blockIdx.x; t < tiles.count(); t += gridDim.x) {
    const int64_t first_x = t / tiles.columns * kTile, first_y = t % tiles.columns * kTile;
    if ((s.self && first_y < first_x) || first_x >= sink.row_limit) continue;
    Sums<T> sums;
    multiply(s, first_x, first_y, left, right, sums);
    share(sums, products);
    each_pair(s, first_x, first_y, products, [&](int64_t i, int64_t j, T product) {
      if (i >= sink.row_limit) return;
      const double value = s.decided(i, j, product, threshold);
      if (!(s.key(value) >= threshold)) return;
      atomicAdd(sink.counts + i, 1ull);
      const auto slot = static_cast<int64_t>(atomicAdd(sink.found, 1ull));
      if (slot >= sink.capacity) return;
      sink.keys[slot] = key_of(i, j, s.y.n);
      sink.values[slot] = static_cast<T>(value);
    });
  }
}

// The rows that hold the first `wanted` pairs: limit[0] rows with limit[1] pairs in all.
// ends (N,) is the running sum of the counts.
static __global__ void __launch_bounds__(kThreads)
    row_limit_kernel(const int64_t* ends, int64_t n, int64_t wanted, int64_t* limit) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  limit[0] = low + 1;
  limit[1] = ends[low];
}

static __global__ void __launch_bounds__(kThreads)
    split_kernel(const int64_t* keys, int64_t count, int64_t columns, int64_t* row, int64_t* col) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count;
       e += step) {
    row[e] = row_of(keys[e], columns);
    col[e] = column_of(keys[e], columns);
  }
}

// Clusters: a forest in which the smallest member of a set is its root. A root is only ever replaced
// by a smaller one, so the sets at the end do not depend on the order.
__device__ inline int32_t root_of(int32_t* parent, int32_t i) {
  for (int32_t up = atomicAdd(parent + i, 0); up != i; up = atomicAdd(parent + i, 0)) i = up;
  return i;
}

__device__ inline void join(int32_t* parent, int32_t a, int32_t b) {
  while (true) {
    a = root_of(parent, a);
    b = root_of(parent, b);
    if (a == b) return;
    const int32_t upper = a < b ? b : a, lower = a < b ? a : b;
    if (atomicCAS(parent + upper, upper, lower) == upper) return;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    clusters_kernel(Search<T> s, double threshold, int32_t* parent) {
  SAPWOOD_SHARED(T, left, kDepth * kPitch);
  SAPWOOD_SHARED(T, right, kDepth * kPitch);
  SAPWOOD_SHARED(T, products, kTile * kPitch);
  const Tiles tiles = Tiles::of(s);
  for (int64_t t = blockIdx.x; t < tiles.count(); t += gridDim.x) {
    const int64_t first_x = t / tiles.columns * kTile, first_y = t % tiles.columns * kTile;
    if (first_y < first_x) continue;
    Sums<T> sums;
    multiply(s, first_x, first_y, left, right, sums);
    share(sums, products);
    each_pair(s, first_x, first_y, products, [&](int64_t i, int64_t j, T product) {
      if (s.key(s.decided(i, j, product, threshold)) >= threshold) {
        join(parent, static_cast<int32_t>(i), static_cast<int32_t>(j));
      }
    });
  }
}

static __global__ void __launch_bounds__(kThreads) parents_kernel(int32_t* parent, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    parent[i] = static_cast<int32_t>(i);
  }
}

// is_root (N,): 1 for roots. Afterwards, with the running sum of it: labels by first members.
static __global__ void __launch_bounds__(kThreads)
    roots_kernel(int32_t* parent, int64_t n, int64_t* is_root) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    is_root[i] = parent[i] == i;
  }
}

static __global__ void __launch_bounds__(kThreads)
    labels_kernel(int32_t* parent, int64_t n, const int64_t* number, int64_t* labels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    labels[i] = number[root_of(parent, static_cast<int32_t>(i))] - 1;
  }
}

template <class T>
void launch_pairs(const Search<T>& s, double threshold, const PairSink<T>& sink, Stream stream) {
  const int64_t tiles = Tiles::of(s).count();
  if (tiles == 0) return;
  auto kernel = pairs_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(tiles, 1), kThreads, 0, stream, s, threshold, sink);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_row_limit(const int64_t* ends, int64_t n, int64_t wanted, int64_t* limit,
                             Stream stream) {
  auto kernel = row_limit_kernel;
  SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, stream, ends, n, wanted, limit);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_split(const int64_t* keys, int64_t count, int64_t columns, int64_t* row,
                         int64_t* col, Stream stream) {
  if (count == 0) return;
  auto kernel = split_kernel;
  SAPWOOD_LAUNCH(kernel, grid_of(count, kThreads), kThreads, 0, stream, keys, count, columns, row,
                 col);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_parents(int32_t* parent, int64_t n, Stream stream) {
  auto kernel = parents_kernel;
  SAPWOOD_LAUNCH(kernel, grid_of(n, kThreads), kThreads, 0, stream, parent, n);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_clusters(const Search<T>& s, double threshold, int32_t* parent, Stream stream) {
  if (s.x.n == 0) return;
  launch_parents(parent, s.x.n, stream);
  auto kernel = clusters_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(Tiles::of(s).count(), 1), kThreads, 0, stream, s, threshold,
                 parent);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_roots(int32_t* parent, int64_t n, int64_t* is_root, Stream stream) {
  if (n == 0) return;
  auto kernel = roots_kernel;
  SAPWOOD_LAUNCH(kernel, grid_of(n, kThreads), kThreads, 0, stream, parent, n, is_root);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

inline void launch_labels(int32_t* parent, int64_t n, const int64_t* number, int64_t* labels,
                          Stream stream) {
  if (n == 0) return;
  auto kernel = labels_kernel;
  SAPWOOD_LAUNCH(kernel, grid_of(n, kThreads), kThreads, 0, stream, parent, n, number, labels);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::similarity::device
