// Memory to fetch while the register tiles compute: the outputs of a block, which are written when its
// sums are complete, and the source pixels of the chunk that comes next.
#pragma once

#include <vector>

#include "copruned_conv/cpu_list.h"

namespace sapwood::copruned_conv {

class AheadList {
 public:
  void clear() {
    ranges_.clear();
    lines_ = 0;
  }

  // The channels of a block at the listed pixels.
  template <class S>
  void add_outputs(const PixelList& list, const Block& block, const Target<S>& target) {
    for (int64_t p = 0; p < list.count; ++p) {
      add_runs(target.y + list.places[p] * target.channels, block);
    }
  }

  // The wanted channels of the pixels under the items [first, last).
  template <class S>
  void add_sources(const Image<S>& batch, const std::vector<Block>& channels,
                   const std::vector<Item>& items, int64_t first, int64_t last, const Taps& taps,
                   const WindowShape& shape) {
    const bool all = static_cast<int64_t>(channels.size()) * kLine >= batch.channels;
    for (int64_t i = first; i < last; ++i) {
      const Item& item = items[static_cast<size_t>(i)];
      const int64_t top = item.y * taps.step_y + taps.top, left = item.x * taps.step_x + taps.left;
      const int64_t from = std::max<int64_t>(left, 0), to = std::min(left + shape.cols, batch.cols);
      if (from >= to) continue;
      const int64_t bottom = std::min(top + shape.rows, batch.rows);
      for (int64_t y = std::max<int64_t>(top, 0); y < bottom; ++y) {
        const S* pixel =
            batch.data + ((item.sample * batch.rows + y) * batch.cols + from) * batch.channels;
        if (all) {
          add(pixel, (to - from) * batch.channels);
          continue;
        }
        for (int64_t x = from; x < to; ++x, pixel += batch.channels) {
          for (const Block& block : channels) add_runs(pixel, block);
        }
      }
    }
  }

  // Everything within so many register tiles, each of which has time for a few lines.
  Ahead over(int64_t tiles) {
    constexpr int64_t kMost = 24;  // more would wait for the memory
    const int64_t lines = std::min(kMost, 1 + lines_ / std::max<int64_t>(1, tiles));
    return {ranges_.data(), ranges_.data() + ranges_.size(), lines};
  }

 private:
  template <class S>
  void add_runs(const S* pixel, const Block& block) {
    for (int32_t r = 0; r < block.runs; ++r) add(pixel + block.run[r].first, block.run[r].count);
  }

  template <class S>
  void add(const S* at, int64_t count) {
    ranges_.push_back(
        {reinterpret_cast<const char*>(at), reinterpret_cast<const char*>(at + count)});
    lines_ += 1 + count * static_cast<int64_t>(sizeof(S)) / 64;
  }

  int64_t lines_ = 0;
  std::vector<Ahead::Range> ranges_;
};

}  // namespace sapwood::copruned_conv
