// The sums of a convolution on the device: an implicit matrix product for each chunk of pixels of one
// sample and 32 of its kept filters, and one thread per output for depthwise.
#pragma once

#include "copruned_conv/cuda_list.cuh"

namespace sapwood::copruned_conv::device {

inline constexpr int kPixels = 64;   // of a block
inline constexpr int kFilters = 32;  // of a block
inline constexpr int kSlice = 16;    // input channels in shared memory at a time
inline constexpr int kEach = 4;      // pixels and filters of a thread
inline constexpr int kAcross = kFilters / kEach;
inline constexpr int kDown = kPixels / kEach;
static_assert(kAcross * kDown == kThreads);

// Where the weights of one filter, channel and tap lie.
template <class S>
struct Weights {
  const S* data;
  int64_t output, input, row, col;
  int kernel_cols;

  SAPWOOD_HD int64_t at(int tap, int64_t channel, int64_t filter) const {
    return filter * output + channel * input + tap / kernel_cols * row + tap % kernel_cols * col;
  }
};

// A sum over taps and channels. Items of sample b are items[b * capacity, ...), counts[b] of them;
// both null for all tiles.
template <class S>
struct Conv {
  const S* x;  // (batch, rows, cols, channels)
  int64_t rows, cols, channels;
  const bool* source_region;  // of x, or null
  int64_t source_tile;
  Weights<S> weights;
  const S *bias, *residual;
  S* y;  // (batch, out_rows, out_cols, filters)
  int64_t batch, out_rows, out_cols, filters;
  const bool *filters_on, *inputs_on;
  int64_t group;
  const int32_t *items, *counts;
  int64_t capacity, tile_cols, edge;
  Lattice lattice;
  Taps taps;
  Activation activation;

  SAPWOOD_HD int64_t pixels_of(int64_t b) const {
    return (counts == nullptr ? capacity : counts[b]) * edge * edge;
  }
  SAPWOOD_HD bool input_on(int64_t b, int64_t channel) const {
    return inputs_on == nullptr || inputs_on[b * (channels / group) + channel / group];
  }
  SAPWOOD_HD bool filter_on(int64_t b, int64_t filter) const {
    return filters_on == nullptr || filters_on[b * (filters / group) + filter / group];
  }

  // The lattice coordinates of pixel p of a sample's items; false outside of the lattice.
  SAPWOOD_HD bool locate(int64_t b, int64_t p, int64_t* i, int64_t* j) const {
    const int64_t number = p / (edge * edge);
    const int64_t item = items == nullptr ? number : items[b * capacity + number];
    *i = item / tile_cols * edge + p % (edge * edge) / edge;
    *j = item % tile_cols * edge + p % edge;
    return *i < lattice.rows && *j < lattice.cols;
  }
  SAPWOOD_HD int64_t place(int64_t b, int64_t i, int64_t j) const {
    const int64_t row = lattice.origin_y + i * lattice.spread_y;
    return (b * out_rows + row) * out_cols + lattice.origin_x + j * lattice.spread_x;
  }
  // The source pixel of a tap, or -1 where it counts as zero.
  SAPWOOD_HD int64_t source(int64_t b, int64_t i, int64_t j, int tap) const {
    const int64_t row = i * taps.step_y + taps.dy[tap], col = j * taps.step_x + taps.dx[tap];
    if (row < 0 || row >= rows || col < 0 || col >= cols) return -1;
    if (source_region != nullptr) {
      const int64_t across = (cols + source_tile - 1) / source_tile;
      const int64_t down = (rows + source_tile - 1) / source_tile;
      const int64_t tile = row / source_tile * across + col / source_tile;
      if (!source_region[b * down * across + tile]) return -1;
    }
    return (b * rows + row) * cols + col;
  }
};

template <class T>
__device__ inline T activated(T x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return x < T(0) ? T(0) : x;
    case Activation::gelu:
      return T(0.5) * x * erfc(-x * T(0.70710678118654752440));
    case Activation::silu:
      return x / (T(1) + exp(-x));
    case Activation::leaky_relu:
      return x < T(0) ? T(0.2) * x : x;
    default:
      return x;
  }
}

template <class S>
__device__ inline void finish(const Conv<S>& c, typename Sum<S>::type sum, int64_t pixel,
                              int64_t filter) {
  using T = typename Sum<S>::type;
  const int64_t at = pixel * c.filters + filter;
  const T value = activated(sum, c.activation);
  c.y[at] = static_cast<S>(c.residual == nullptr ? value : value + static_cast<T>(c.residual[at]));
}

// The numbers of the kept filters first, first + 1, ... of a sample, -1 beyond the last; by thread 0.
template <class S>
__device__ inline void list_filters(const Conv<S>& c, int64_t b, int64_t first, int32_t* list) {
  int found = 0;
  int64_t skipped = 0;
  for (int64_t k = 0; k < c.filters && found < kFilters;) {
    const int64_t left = c.filters_on == nullptr ? c.filters - k : c.group;
    if (!c.filter_on(b, k) || skipped + left <= first) {
      skipped += c.filter_on(b, k) ? left : 0;
      k += left;
      continue;
    }
    for (int64_t f = first > skipped ? first - skipped : 0; f < left && found < kFilters; ++f) {
      list[found++] = static_cast<int32_t>(k + f);
    }
    skipped += left;
    k += left;
    first = skipped;
  }
  for (; found < kFilters; ++found) list[found] = -1;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) conv_kernel(Conv<S> c) {
  using T = typename Sum<S>::type;
  SAPWOOD_SHARED(T, a, kSlice * (kPixels + 1));
  SAPWOOD_SHARED(T, w, kSlice * kFilters);
  SAPWOOD_SHARED(int64_t, sources, kPixels);
  SAPWOOD_SHARED(int32_t, list, kFilters);
  const int tid = static_cast<int>(threadIdx.x), across = tid % kAcross, down = tid / kAcross;
  const int64_t chunks = (c.capacity * c.edge * c.edge + kPixels - 1) / kPixels;
  const int64_t blocks = (c.filters + kFilters - 1) / kFilters;
  for (int64_t work = blockIdx.x; work < c.batch * chunks * blocks; work += gridDim.x) {
    const int64_t b = work / (chunks * blocks), first = work / blocks % chunks * kPixels;
    const int64_t pixels = c.pixels_of(b);
    if (first >= pixels) continue;
    __syncthreads();
    if (tid == 0) list_filters(c, b, work % blocks * kFilters, list);
    __syncthreads();
    if (list[0] < 0) continue;
    T sums[kEach][kEach];
    SAPWOOD_UNROLL
    for (int p = 0; p < kEach; ++p) {
      SAPWOOD_UNROLL
      for (int f = 0; f < kEach; ++f) {
        const int32_t filter = list[across * kEach + f];
        sums[p][f] = c.bias == nullptr || filter < 0 ? T(0) : static_cast<T>(c.bias[filter]);
      }
    }
    for (int tap = 0; tap < static_cast<int>(c.taps.count); ++tap) {
      if (tid < kPixels) {  // a barrier has followed every read of the previous tap's
        int64_t i, j;
        const bool inside = first + tid < pixels && c.locate(b, first + tid, &i, &j);
        sources[tid] = inside ? c.source(b, i, j, tap) : -1;
      }
      for (int64_t channel = 0; channel < c.channels;) {
        const int64_t left = c.channels - channel;
        const int64_t room = c.inputs_on == nullptr ? left : c.group - channel % c.group;
        const int64_t most = room < left ? room : left;
        const int count = static_cast<int>(most < kSlice ? most : kSlice);
        if (!c.input_on(b, channel)) {
          channel += count;
          continue;
        }
        __syncthreads();
        for (int e = tid; e < kPixels * kSlice; e += kThreads) {
          const int p = e / kSlice, k = e % kSlice;
          const bool some = k < count && sources[p] >= 0;
          a[k * (kPixels + 1) + p] =
              some ? static_cast<T>(c.x[sources[p] * c.channels + channel + k]) : T(0);
        }
        for (int e = tid; e < kSlice * kFilters; e += kThreads) {
          const int k = e / kFilters, f = e % kFilters;
          const bool some = k < count && list[f] >= 0;
          const int at = c.taps.weight[tap];
          w[e] =
              some ? static_cast<T>(c.weights.data[c.weights.at(at, channel + k, list[f])]) : T(0);
        }
        __syncthreads();
        for (int k = 0; k < count; ++k) {
          SAPWOOD_UNROLL
          for (int p = 0; p < kEach; ++p) {
            const T value = a[k * (kPixels + 1) + down + p * kDown];
            SAPWOOD_UNROLL
            for (int f = 0; f < kEach; ++f) {
              sums[p][f] += value * w[k * kFilters + across * kEach + f];
            }
          }
        }
        channel += count;
      }
    }
    SAPWOOD_UNROLL
    for (int p = 0; p < kEach; ++p) {
      int64_t i, j;
      const int64_t pixel = first + down + p * kDown;
      if (pixel >= pixels || !c.locate(b, pixel, &i, &j)) continue;
      SAPWOOD_UNROLL
      for (int f = 0; f < kEach; ++f) {
        const int32_t filter = list[across * kEach + f];
        if (filter >= 0) finish(c, sums[p][f], c.place(b, i, j), filter);
      }
    }
  }
}

// One thread per output; neighbouring threads have neighbouring channels.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) depthwise_kernel(Conv<S> c) {
  using T = typename Sum<S>::type;
  const int64_t most = c.capacity * c.edge * c.edge * c.filters;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < c.batch * most;
       e += step) {
    const int64_t b = e / most, p = e % most / c.filters, filter = e % c.filters;
    int64_t i, j;
    if (p >= c.pixels_of(b) || !c.filter_on(b, filter) || !c.locate(b, p, &i, &j)) continue;
    T sum = c.bias == nullptr ? T(0) : static_cast<T>(c.bias[filter]);
    for (int tap = 0; c.input_on(b, filter) && tap < static_cast<int>(c.taps.count); ++tap) {
      const int64_t from = c.source(b, i, j, tap);
      if (from < 0) continue;
      const S w = c.weights.data[c.weights.at(c.taps.weight[tap], 0, filter)];
      sum += static_cast<T>(c.x[from * c.channels + filter]) * static_cast<T>(w);
    }
    finish(c, sum, c.place(b, i, j), filter);
  }
}

template <class S>
void launch_conv(const Conv<S>& c, bool depthwise, Stream stream) {
  const int64_t pixels = c.capacity * c.edge * c.edge;
  if (c.batch == 0 || pixels == 0 || c.filters == 0) return;
  if (depthwise) {
    auto kernel = depthwise_kernel<S>;
    const int64_t blocks = (c.batch * pixels * c.filters + kThreads - 1) / kThreads;
    SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, stream, c);
  } else {
    auto kernel = conv_kernel<S>;
    const int64_t blocks =
        c.batch * ((pixels + kPixels - 1) / kPixels) * ((c.filters + kFilters - 1) / kFilters);
    SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, stream, c);
  }
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::copruned_conv::device
