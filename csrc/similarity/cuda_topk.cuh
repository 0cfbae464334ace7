// The k best candidates of every query. A block owns 64 queries and walks over all candidates; a
// thread owns a query's list, a heap whose root is the worst of the k. What may enter is decided in
// double, so the list is exact at any time and the order of the tiles does not matter.
#pragma once

#include "similarity/cuda_tile.cuh"

namespace sapwood::similarity::device {

// keys and indices (N, k) in global memory
struct Lists {
  double* keys;
  int64_t* indices;
  int64_t k;
};

// One query's heap: every parent is worse than its children. Equal keys: the larger index is worse.
struct Heap {
  double* keys;
  int64_t* indices;

  SAPWOOD_HD static bool worse(double key, int64_t index, double other, int64_t other_index) {
    return key != other ? key < other : index > other_index;
  }

  SAPWOOD_HD void swap(int64_t a, int64_t b) const {
    const double key = keys[a];
    const int64_t index = indices[a];
    keys[a] = keys[b];
    indices[a] = indices[b];
    keys[b] = key;
    indices[b] = index;
  }

  SAPWOOD_HD void rise(int64_t at) const {
    while (at > 0) {
      const int64_t up = (at - 1) / 2;
      if (!worse(keys[at], indices[at], keys[up], indices[up])) return;
      swap(at, up);
      at = up;
    }
  }

  SAPWOOD_HD void sink(int64_t at, int64_t size) const {
    while (2 * at + 1 < size) {
      int64_t child = 2 * at + 1;
      const bool right = child + 1 < size &&
                         worse(keys[child + 1], indices[child + 1], keys[child], indices[child]);
      child += right;
      if (!worse(keys[child], indices[child], keys[at], indices[at])) return;
      swap(at, child);
      at = child;
    }
  }
};

// Tiles in shared memory, kDepth * kPitch twice and kTile * kPitch.
template <class T>
struct Staging {
  T *left, *right, *products;
};

// Offers candidate j with its product to the heap of query i, which holds `size` entries.
template <class T>
__device__ void offer(const Search<T>& s, const Heap& heap, int64_t k, int64_t i, int64_t j,
                      T product, int64_t& size) {
  const double value = s.value_of(i, j, product);
  const bool full = size == k;
  const bool finite = value - value == 0.0;
  if (full && finite && s.key(value) + s.tolerance(i, j, value) < heap.keys[0]) return;
  const double key = s.key(s.recheck ? s.exact(i, j) : value);
  if (full && !Heap::worse(heap.keys[0], heap.indices[0], key, j)) return;
  const int64_t slot = full ? 0 : size++;
  heap.keys[slot] = key;
  heap.indices[slot] = j;
  if (full) {
    heap.sink(0, size);
  } else {
    heap.rise(slot);
  }
}

// The lists of the 64 queries of tile t, by one block.
template <class T>
__device__ void rank_tile(const Search<T>& s, int64_t t, const Lists& lists,
                          const Staging<T>& staging, T* values, int64_t* indices) {
  const int own = static_cast<int>(threadIdx.x);
  const int64_t i = t * kTile + own;
  const bool active = own < kTile && i < s.x.n;
  const Heap heap{active ? lists.keys + i * lists.k : nullptr,
                  active ? lists.indices + i * lists.k : nullptr};
  int64_t size = 0;
  for (int64_t column = 0; column < Tiles::of(s).columns; ++column) {
    Sums<T> sums;
    multiply(s, t * kTile, column * kTile, staging.left, staging.right, sums);
    share(sums, staging.products);
    for (int c = 0; active && c < kTile; ++c) {
      const int64_t j = column * kTile + c;
      if (j >= s.y.n || (s.self && i == j && !s.include_self)) continue;
      offer(s, heap, lists.k, i, j, staging.products[own * kPitch + c], size);
    }
  }
  for (int64_t left_over = size; active && left_over > 1; --left_over) {  // best first
    heap.swap(0, left_over - 1);
    heap.sink(0, left_over - 1);
  }
  for (int64_t e = 0; active && e < lists.k; ++e) {
    const bool present = e < size;
    const int64_t j = present ? heap.indices[e] : -1;
    const double value = !present     ? -static_cast<double>(INFINITY)
                         : s.absolute ? s.exact(i, j)
                                      : heap.keys[e];
    values[i * lists.k + e] = static_cast<T>(value);
    indices[i * lists.k + e] = j;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(Search<T> s, Lists lists, T* values, int64_t* indices) {
  SAPWOOD_SHARED(T, left, kDepth * kPitch);
  SAPWOOD_SHARED(T, right, kDepth * kPitch);
  SAPWOOD_SHARED(T, products, kTile * kPitch);
  const Staging<T> staging{left, right, products};
  for (int64_t t = blockIdx.x; t < Tiles::of(s).rows; t += gridDim.x) {
    rank_tile(s, t, lists, staging, values, indices);
  }
}

template <class T>
void launch_topk(const Search<T>& s, const Lists& lists, T* values, int64_t* indices,
                 Stream stream) {
  if (s.x.n == 0) return;
  auto kernel = topk_kernel<T>;
  SAPWOOD_LAUNCH(kernel, grid_of(Tiles::of(s).rows, 1), kThreads, 0, stream, s, lists, values,
                 indices);
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::similarity::device
