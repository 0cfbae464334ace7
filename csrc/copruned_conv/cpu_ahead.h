// Memory to fetch while the register tiles compute: the outputs of a block, which are written when its
// sums are complete, and the source pixels of the chunk that comes next.
#pragma once

#include <vector>

#include "copruned_conv/cpu_list.h"

namespace sapwood::copruned_conv {

class AheadList {
 public:
  void clear() { ranges_.clear(); }

  // The channels of a block at the listed pixels.
  template <class S>
  void add_outputs(const PixelList& list, const Block& block, const Target<S>& target) {
    for (int64_t p = 0; p < list.count; ++p) {
      const S* pixel = target.y + list.places[p] * target.channels;
      for (int32_t r = 0; r < block.runs; ++r) {
        add(pixel + block.run[r].first, block.run[r].count);
      }
    }
  }

  // All channels of the pixels under the items [first, last).
  template <class S>
  void add_sources(const Image<S>& batch, const std::vector<Item>& items, int64_t first,
                   int64_t last, const Taps& taps, const WindowShape& shape) {
    for (int64_t i = first; i < last; ++i) {
      const Item& item = items[static_cast<size_t>(i)];
      const int64_t top = item.y * taps.step_y + taps.top, left = item.x * taps.step_x + taps.left;
      const int64_t from = std::max<int64_t>(left, 0), to = std::min(left + shape.cols, batch.cols);
      if (from >= to) continue;
      const int64_t bottom = std::min(top + shape.rows, batch.rows);
      for (int64_t y = std::max<int64_t>(top, 0); y < bottom; ++y) {
        const int64_t pixel = (item.sample * batch.rows + y) * batch.cols + from;
        add(batch.data + pixel * batch.channels, (to - from) * batch.channels);
      }
    }
  }

  Ahead get() { return {ranges_.data(), ranges_.data() + ranges_.size()}; }

 private:
  template <class S>
  void add(const S* at, int64_t count) {
    ranges_.push_back(
        {reinterpret_cast<const char*>(at), reinterpret_cast<const char*>(at + count)});
  }

  std::vector<Ahead::Range> ranges_;
};

}  // namespace sapwood::copruned_conv
