// Convolution of the regions and filters that the masks of a sample keep. The ladder, each rung with
// what it gains over the one before (measured figures are in README.md):
//   1 naive          every wanted output in double, from the definition: the oracle of the unit tests
//   2 list           only wanted pixels are visited; work falls in proportion
//   3 windows        a tile and its halo are copied into 16-channel planes, zeros where the image
//                    ends: no border cases, skipped input channels vanish, every load is one line
//   4 register tile  8 pixels x 32 filters stay in registers; the pixels come from a list, so
//                    that partial tiles and tiles of 2 x 2 fill it as well as whole ones
//   5 weight block   taps x channels x 32 filters of 18 KiB, packed for the filters of this sample,
//                    serve all tiles of a chunk out of L1
// No torch header here; nothing allocates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/math.h"
#include "common/simd.h"
#include "copruned_conv/problem.h"

namespace sapwood::copruned_conv {

inline constexpr int64_t kMaxPixels = 8;    // of a register tile
inline constexpr int64_t kMaxFilters = 32;  // of a register tile
inline constexpr int64_t kWeightBytes = 18 * 1024;

// One sample of a channels-last image; pixels of tiles that are off count as zero.
template <class S>
struct Image {
  const S* data;
  int64_t rows, cols, channels;
  const bool* region;  // (ceil(rows / tile), ceil(cols / tile)), or null
  int64_t tile;
};

// Ranges of memory that are needed soon; a register tile fetches `lines` cache lines in passing.
struct Ahead {
  struct Range {
    const char *at, *end;
  };
  Range *next, *end;
  int64_t lines;
};

// What is left of a sum over products when it is stored.
template <class S>
struct Target {
  S* y;
  const S* residual;  // or null
  int64_t channels;
};

// Where the taps lie: in rows of `columns` taps, `spacing` pixels apart, or anywhere (columns 0).
// Neighbouring pixels are `pitch` elements apart.
struct TapShifts {
  const int32_t* shifts;
  int64_t count, columns, spacing, pitch;
};

// Rung 1: one output in double. x (H, W, C) channels last, w (K, C, kh, kw) contiguous; `channel` is
// the only input channel of a depthwise convolution, or -1.
template <class T>
double output_naive(const T* x, const T* w, const Geometry& g, int64_t rows, int64_t cols,
                    int64_t channels, const bool* inputs, int64_t group, int64_t channel, int64_t k,
                    int64_t py, int64_t px) {
  const int64_t first = channel < 0 ? 0 : channel, last = channel < 0 ? channels : channel + 1;
  double sum = 0;
  for (int64_t c = first; c < last; ++c) {
    if (inputs != nullptr && !inputs[c / group]) continue;
    const T* filter = w + (k * (last - first) + c - first) * g.taps();
    for (int64_t t = 0; t < g.taps(); ++t) {
      const int64_t y = py * g.stride[0] - g.padding[0] + t / g.kernel[1] * g.dilation[0];
      const int64_t z = px * g.stride[1] - g.padding[1] + t % g.kernel[1] * g.dilation[1];
      if (y < 0 || y >= rows || z < 0 || z >= cols) continue;
      sum += static_cast<double>(x[(y * cols + z) * channels + c]) * static_cast<double>(filter[t]);
    }
  }
  return sum;
}

template <class T>
SAPWOOD_INLINE T activate(T x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return math::relu(x);
    case Activation::gelu:
      return math::gelu(x);
    case Activation::silu:
      return math::silu(x);
    case Activation::leaky_relu:
      return x < T(0) ? T(0.2) * x : x;
    default:
      return x;
  }
}

}  // namespace sapwood::copruned_conv

#define SAPWOOD_KERNEL_FILE "copruned_conv/kernel_window.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "copruned_conv/kernel_tile.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "copruned_conv/kernel_depthwise.inl"
#include "common/foreach_isa.h"

namespace sapwood::copruned_conv {

// Filters of the register tile of the instruction set in use; packed weights depend on it.
template <class T>
int64_t filters_of_tile() {
  int64_t filters = 0;
  SAPWOOD_ISA_CALL(tile_filters<T>(filters));
  return filters;
}

}  // namespace sapwood::copruned_conv
