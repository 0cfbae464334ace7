// What a kernel of this family computes, without tensors: taps, lattices, runs of channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sapwood::copruned_conv {

inline constexpr int64_t kMaxTaps = 49;  // 7 x 7
inline constexpr int64_t kLine = 16;     // channels of one pixel that lie together in a window

enum class Activation : int { none, relu, gelu, silu, leaky_relu };

// Output pixel (i, j) of a lattice reads the source pixels (i step_y + dy, j step_x + dx), one for
// each tap. The forward pass, and each parity class of the input's gradient, is one such sum.
struct Taps {
  int64_t count = 0;
  int64_t step_y = 1, step_x = 1;
  int32_t dy[kMaxTaps], dx[kMaxTaps];
  int32_t weight[kMaxTaps];  // where its weights lie in the kernel, row-major
  int32_t top = 0, bottom = 0, left = 0, right = 0;  // extremes of dy and dx

  // Columns of a tap row if all rows are alike and equally spaced, which `spacing` then tells; else 0.
  int64_t regular_columns(int64_t* spacing) const {
    int64_t cols = 0;
    while (cols < count && dy[cols] == dy[0]) ++cols;
    if (step_x != 1 || cols < 2) return 0;
    *spacing = dx[1] - dx[0];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = t / cols * cols;
      if (dy[t] != dy[first] || dx[t] != dx[0] + t % cols * *spacing) return 0;
    }
    return count % cols == 0 ? cols : 0;
  }

  void add(int64_t y, int64_t x, int64_t at) {
    const auto row = static_cast<int32_t>(y), col = static_cast<int32_t>(x);
    top = count == 0 ? row : std::min(top, row);
    bottom = count == 0 ? row : std::max(bottom, row);
    left = count == 0 ? col : std::min(left, col);
    right = count == 0 ? col : std::max(right, col);
    dy[count] = row;
    dx[count] = col;
    weight[count++] = static_cast<int32_t>(at);
  }
};

// Kernel size, stride, padding and dilation, rows first.
struct Geometry {
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t output_size(int axis, int64_t input) const {
    const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1;
    const int64_t room = input + 2 * padding[axis] - reach;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
};

// Output pixels (origin + i spread): all of them, or one parity class.
struct Lattice {
  int64_t rows, cols;
  int64_t origin_y = 0, origin_x = 0, spread_y = 1, spread_x = 1;
};

inline Taps forward_taps(const Geometry& g) {
  Taps taps;
  taps.step_y = g.stride[0];
  taps.step_x = g.stride[1];
  for (int64_t r = 0; r < g.kernel[0]; ++r) {
    for (int64_t s = 0; s < g.kernel[1]; ++s) {
      taps.add(r * g.dilation[0] - g.padding[0], s * g.dilation[1] - g.padding[1],
               r * g.kernel[1] + s);
    }
  }
  return taps;
}

// The gradient of input pixels whose coordinates are class_y and class_x modulo the stride: those
// taps whose output pixel exists, in gather form, so that nothing is added by two threads.
inline Taps gradient_taps(const Geometry& g, int64_t class_y, int64_t class_x) {
  Taps taps;
  for (int64_t r = g.kernel[0] - 1; r >= 0; --r) {  // so that source pixels ascend
    const int64_t y = class_y + g.padding[0] - r * g.dilation[0];
    if (y % g.stride[0] != 0) continue;
    for (int64_t s = g.kernel[1] - 1; s >= 0; --s) {
      const int64_t x = class_x + g.padding[1] - s * g.dilation[1];
      if (x % g.stride[1] == 0) {
        taps.add(y / g.stride[0], x / g.stride[1], r * g.kernel[1] + s);
      }
    }
  }
  return taps;
}

struct Run {
  int32_t first, count;
};

// Up to `width` channels that are computed together, in ascending order, as runs of neighbours.
struct Block {
  static constexpr int kMaxRuns = 5;  // groups have at least 8 channels, a block at most 32
  int32_t count = 0, runs = 0;
  Run run[kMaxRuns];

  void add(int32_t first, int32_t n) {
    count += n;
    if (runs > 0 && run[runs - 1].first + run[runs - 1].count == first) {
      run[runs - 1].count += n;
    } else {
      run[runs++] = {first, n};
    }
  }
};

// The channels whose group is on (all of them without a mask), in blocks of at most `width`.
inline std::vector<Block> blocks_of(const bool* mask, int64_t group, int64_t channels,
                                    int64_t width) {
  std::vector<Block> blocks;
  for (int64_t c = 0; c < channels;) {
    const int64_t end = mask == nullptr ? channels : std::min(channels, (c / group + 1) * group);
    if (mask != nullptr && !mask[c / group]) {
      c = end;
      continue;
    }
    if (blocks.empty() || blocks.back().count == width) blocks.emplace_back();
    Block& block = blocks.back();
    const int64_t n = std::min(end - c, width - block.count);
    block.add(static_cast<int32_t>(c), static_cast<int32_t>(n));
    c += n;
  }
  return blocks;
}

// Channels `first` to `first + width` of which some may be off: a block at a fixed place.
inline Block block_at(const bool* mask, int64_t group, int64_t channels, int64_t first,
                      int64_t width) {
  Block block;
  for (int64_t c = first; c < std::min(first + width, channels);) {
    const int64_t end = mask == nullptr
                            ? std::min(first + width, channels)
                            : std::min({first + width, channels, (c / group + 1) * group});
    if (mask == nullptr || mask[c / group]) {
      block.add(static_cast<int32_t>(c), static_cast<int32_t>(end - c));
    }
    c = end;
  }
  return block;
}

// A rectangle of a lattice that holds at least one wanted pixel.
struct Item {
  int64_t sample;
  int64_t y, x, rows, cols;
};

// 16 channels of all source pixels that an item reads, under one tap: where they begin relative to
// an output pixel, and how many of the channels are in use.
struct Segment {
  int32_t offset, count;
};

}  // namespace sapwood::copruned_conv
