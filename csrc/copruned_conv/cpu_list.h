// Which pixels are wanted, as rectangles and chunks of them for the kernels.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "copruned_conv/kernel.h"

namespace sapwood::copruned_conv {

// One byte for each pixel (batch, rows, cols): whether it is wanted.
struct Wanted {
  Wanted(int64_t batch, int64_t rows, int64_t cols, bool all)
      : batch(batch), rows(rows), cols(cols), map(static_cast<size_t>(batch * rows * cols), all) {}

  int64_t batch, rows, cols;
  std::vector<uint8_t> map;

  const uint8_t* row(int64_t b, int64_t y) const { return map.data() + (b * rows + y) * cols; }

  // Rows [y0, y1) x columns [x0, x1), of which some may lie outside.
  void mark(int64_t b, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    x0 = std::max<int64_t>(x0, 0);
    x1 = std::min(x1, cols);
    if (x0 >= x1) return;
    for (int64_t y = std::max<int64_t>(y0, 0); y < std::min(y1, rows); ++y) {
      std::memset(map.data() + (b * rows + y) * cols + x0, 1, static_cast<size_t>(x1 - x0));
    }
  }

  int64_t count() const {
    int64_t sum = 0;
    for (const uint8_t one : map) sum += one;
    return sum;
  }
};

// Tiles (batch, ceil(rows / tile), ceil(cols / tile)) of the output, null for all.
struct Region {
  const bool* mask;
  int64_t rows, cols, tile;

  int64_t tile_rows() const { return (rows + tile - 1) / tile; }
  int64_t tile_cols() const { return (cols + tile - 1) / tile; }
  const bool* sample(int64_t b) const {
    return mask == nullptr ? nullptr : mask + b * tile_rows() * tile_cols();
  }

  // f(sample, tile row, tile column) for every tile that is on.
  template <class F>
  void each(int64_t batch, const F& f) const {
    for (int64_t b = 0; b < batch; ++b) {
      const bool* on = sample(b);
      for (int64_t y = 0; y < tile_rows(); ++y) {
        for (int64_t x = 0; x < tile_cols(); ++x) {
          if (on[y * tile_cols() + x]) f(b, y, x);
        }
      }
    }
  }
};

// The output pixels of the tiles that are on.
inline Wanted wanted_outputs(const Region& region, int64_t batch) {
  Wanted wanted(batch, region.rows, region.cols, region.mask == nullptr);
  if (region.mask == nullptr) return wanted;
  const int64_t t = region.tile;
  region.each(batch, [&](int64_t b, int64_t y, int64_t x) {
    wanted.mark(b, y * t, (y + 1) * t, x * t, (x + 1) * t);
  });
  return wanted;
}

// The input pixels that an output pixel of a tile that is on may read: only those have a gradient.
inline Wanted read_inputs(const Region& region, int64_t batch, const Geometry& g, int64_t rows,
                          int64_t cols) {
  Wanted wanted(batch, rows, cols, region.mask == nullptr);
  if (region.mask == nullptr) return wanted;
  const auto first = [&](int axis, int64_t tile) {
    return tile * region.tile * g.stride[axis] - g.padding[axis];
  };
  const auto last = [&](int axis, int64_t tile, int64_t size) {
    const int64_t pixel = std::min((tile + 1) * region.tile, size) - 1;
    return pixel * g.stride[axis] - g.padding[axis] + g.dilation[axis] * (g.kernel[axis] - 1);
  };
  region.each(batch, [&](int64_t b, int64_t y, int64_t x) {
    wanted.mark(b, first(0, y), last(0, y, region.rows) + 1, first(1, x),
                last(1, x, region.cols) + 1);
  });
  return wanted;
}

// Rectangles of `edge` x `edge` lattice pixels that hold a wanted one, by sample and in raster order.
inline std::vector<Item> items_of(const Wanted& wanted, const Lattice& lattice, int64_t edge) {
  std::vector<Item> items;
  for (int64_t b = 0; b < wanted.batch; ++b) {
    for (int64_t y = 0; y < lattice.rows; y += edge) {
      for (int64_t x = 0; x < lattice.cols; x += edge) {
        const Item item{b, y, x, std::min(edge, lattice.rows - y),
                        std::min(edge, lattice.cols - x)};
        bool some = false;
        for (int64_t i = y; i < y + item.rows && !some; ++i) {
          const uint8_t* row = wanted.row(b, lattice.origin_y + i * lattice.spread_y);
          for (int64_t j = x; j < x + item.cols; ++j) {
            some |= row[lattice.origin_x + j * lattice.spread_x] != 0;
          }
        }
        if (some) items.push_back(item);
      }
    }
  }
  return items;
}

// Neighbouring items of one sample.
struct Chunk {
  int64_t first, last;
};

// Windows of a chunk, beside sums and weights, shall lie in a 1 MiB L2.
inline constexpr int64_t kWindowBytes = 640 * 1024;
inline constexpr int64_t kChunkPixels = 768;

// At most `most` items each, fewer where their windows would be too large.
inline std::vector<Chunk> chunks_of(const std::vector<Item>& items, int64_t most,
                                    int64_t window_bytes) {
  most = std::max<int64_t>(1, std::min(most, kWindowBytes / window_bytes));
  std::vector<Chunk> chunks;
  const auto count = static_cast<int64_t>(items.size());
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = !chunks.empty() && i - chunks.back().first < most &&
                      items[static_cast<size_t>(chunks.back().first)].sample ==
                          items[static_cast<size_t>(i)].sample;
    if (!fits) chunks.push_back({i, i});
    chunks.back().last = i + 1;
  }
  return chunks;
}

// Distances in the memory that holds source pixels, in elements.
struct Pitch {
  int64_t row, pixel;

  int32_t shift(const Taps& taps, int64_t t) const {
    return static_cast<int32_t>((taps.dy[t] - taps.top) * row + (taps.dx[t] - taps.left) * pixel);
  }
};

// The size of the source window under an item.
struct WindowShape {
  WindowShape(const Taps& taps, int64_t edge)
      : rows((edge - 1) * taps.step_y + taps.bottom - taps.top + 1),
        cols((edge - 1) * taps.step_x + taps.right - taps.left + 1) {
    // Places in a window are numbered in 32 bits.
    STD_TORCH_CHECK(rows * cols < (int64_t{1} << 31) / kLine,
                    "sapwood.copruned_conv2d: stride and dilation must give windows of fewer than ",
                    (int64_t{1} << 31) / kLine, " pixels, got ", rows, " x ", cols);
  }

  int64_t rows, cols;

  int64_t plane() const { return rows * cols * kLine; }
  Pitch pitch() const { return {cols * kLine, kLine}; }
};

// The wanted pixels of a chunk: where their windows begin, and their places in the output. Register
// tiles may read offsets beyond the last pixel: there are some more, which repeat the first.
struct PixelList {
  int32_t offsets[kChunkPixels + kMaxPixels];
  int32_t places[kChunkPixels];
  int64_t count = 0;
};

// base_of(item, number in the chunk) is where the item's first source pixel lies.
template <class F>
void list_pixels(const std::vector<Item>& items, const Chunk& chunk, const Wanted& wanted,
                 const Lattice& lattice, const Taps& taps, const Pitch& pitch, const F& base_of,
                 PixelList& list) {
  list.count = 0;
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const Item& item = items[static_cast<size_t>(i)];
    const int64_t base = base_of(item, i - chunk.first);
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t y = lattice.origin_y + (item.y + r) * lattice.spread_y;
      const uint8_t* row = wanted.row(item.sample, y);
      for (int64_t c = 0; c < item.cols; ++c) {
        const int64_t x = lattice.origin_x + (item.x + c) * lattice.spread_x;
        if (!row[x]) continue;
        list.offsets[list.count] = static_cast<int32_t>(base + r * taps.step_y * pitch.row +
                                                        c * taps.step_x * pitch.pixel);
        list.places[list.count++] = static_cast<int32_t>(y * wanted.cols + x);
      }
    }
  }
  std::fill_n(list.offsets + list.count, kMaxPixels, list.offsets[0]);
}

}  // namespace sapwood::copruned_conv
