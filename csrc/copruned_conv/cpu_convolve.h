// Sums over taps and channels for the wanted pixels: the forward pass and the gradient of the input,
// dense in channels or depthwise.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/scratch.h"
#include "copruned_conv/cpu_ahead.h"

namespace sapwood::copruned_conv {

using ChannelBlocks = std::vector<std::vector<Block>>;  // by sample

// The channels of every sample whose groups are on, in blocks of `width`; mask (batch, groups).
inline ChannelBlocks channel_blocks(const bool* mask, int64_t group, int64_t batch,
                                    int64_t channels, int64_t width) {
  ChannelBlocks blocks;
  for (int64_t b = 0; b < batch; ++b) {
    const bool* row = mask == nullptr ? nullptr : mask + b * (channels / group);
    blocks.push_back(blocks_of(row, group, channels, width));
  }
  return blocks;
}

// One sum of a convolution. S is how tensors are stored, T what is summed in.
template <class S, class T>
struct Convolution {
  Taps taps;
  Lattice lattice;
  Image<S> image;     // of sample 0
  int64_t tiles = 0;  // of one sample in image.region
  Target<S> target;   // of sample 0
  const T* weights;   // (taps of the kernel, inputs, outputs); (taps, channels) when depthwise
  const T* bias;      // (outputs,) or null
  Activation activation = Activation::none;
  const Wanted& wanted;
  const ChannelBlocks& inputs;
  const ChannelBlocks& outputs;

  Image<S> source(int64_t b) const {
    Image<S> one = image;
    one.data += b * image.rows * image.cols * image.channels;
    if (image.region != nullptr) one.region += b * tiles;
    return one;
  }
  Target<S> sink(int64_t b) const {
    const int64_t at = b * wanted.rows * wanted.cols * target.channels;
    return {target.y + at, target.residual == nullptr ? nullptr : target.residual + at,
            target.channels};
  }
};

// What a thread needs for one chunk.
template <class S, class T>
class ChunkWork {
 public:
  ChunkWork(const Convolution<S, T>& c, const std::vector<Item>& items, int64_t edge,
            const Chunk& chunk, const Chunk& next, int64_t planes)
      : c_(c),
        items_(items),
        chunk_(chunk),
        next_(next),
        shape_(c.taps, edge),
        sample_(items[static_cast<size_t>(chunk.first)].sample),
        inputs_(c.inputs[static_cast<size_t>(sample_)]),
        outputs_(c.outputs[static_cast<size_t>(sample_)]),
        planes_(std::clamp<int64_t>(
            kWindowBytes / (shape_.plane() * static_cast<int64_t>(sizeof(T))), 1, planes)),
        windows_((chunk.last - chunk.first) * planes_ * shape_.plane()),
        sums_((kChunkPixels + kMaxPixels) * std::max(kMaxFilters, kLine)),
        weights_(kWeightBytes / static_cast<int64_t>(sizeof(T)) + kLine * kMaxFilters) {
    const int64_t size = planes_ * shape_.plane();
    list_pixels(
        items, chunk, c.wanted, c.lattice, c.taps, shape_.pitch(),
        [&](const Item&, int64_t i) { return i * size; }, list_);
  }

  void run() {
    for (size_t b = 0; b < outputs_.size(); ++b) {
      look_ahead(static_cast<int64_t>(b));
      multiply_block(outputs_[b]);
    }
  }

  // Every channel with itself; `on` tells which channels of the image are not zero.
  void run_depthwise(const bool* on, int64_t group) {
    const auto blocks = static_cast<int64_t>(outputs_.size());
    for (int64_t first = 0; first < blocks; first += planes_) {
      const int64_t count = std::min(planes_, blocks - first);
      load_windows(outputs_.data() + first, count);
      for (int64_t b = 0; b < count; ++b) {
        const Block& block = outputs_[static_cast<size_t>(first + b)];
        if (on != nullptr) clear_channels(block, on, group, b * shape_.plane());
        load_filters(block);
        multiply_line(block, windows_.get() + b * shape_.plane(), shape_.pitch());
      }
    }
  }

  // The same without windows, for items whose source pixels all lie inside of the image; item by item,
  // so that the lines of a pixel are read one after another.
  void run_inside() {
    const Image<S> image = c_.source(sample_);
    const Pitch pitch{image.cols * image.channels, image.channels};
    for (int64_t i = chunk_.first; i < chunk_.last; ++i) {
      list_pixels(
          items_, Chunk{i, i + 1}, c_.wanted, c_.lattice, c_.taps, pitch,
          [&](const Item& item, int64_t) {
            return (item.y * c_.taps.step_y + c_.taps.top) * pitch.row +
                   (item.x * c_.taps.step_x + c_.taps.left) * pitch.pixel;
          },
          list_);
      for (const Block& block : outputs_) {
        load_filters(block);
        multiply_line(block, image.data + block.run[0].first, pitch);
      }
    }
  }

 private:
  void load_windows(const Block* blocks, int64_t planes) {
    const Image<S> image = c_.source(sample_);
    for (int64_t i = chunk_.first; i < chunk_.last; ++i) {
      const Item& item = items_[static_cast<size_t>(i)];
      T* window = windows_.get() + (i - chunk_.first) * planes_ * shape_.plane();
      SAPWOOD_ISA_CALL(load_window(image, item.y * c_.taps.step_y + c_.taps.top,
                                   item.x * c_.taps.step_x + c_.taps.left, shape_.rows, shape_.cols,
                                   blocks, planes, shape_.plane(), window));
    }
  }

  // Weights (taps, 16) and bias of a block of a depthwise convolution.
  void load_filters(const Block& block) {
    SAPWOOD_ISA_CALL(pack_filters(c_.weights, c_.target.channels, c_.taps, block, weights_.get()));
    int64_t at = 0;
    for (int32_t r = 0; r < block.runs; ++r) {
      for (int32_t i = 0; i < block.run[r].count; ++i) {
        bias_[at++] = c_.bias == nullptr ? T(0) : c_.bias[block.run[r].first + i];
      }
    }
    std::fill(bias_ + at, bias_ + kLine, T(0));
  }

  // 16 channels whose first source pixel is at `source`.
  void multiply_line(const Block& block, const T* source, const Pitch& pitch) {
    int32_t shifts[kMaxTaps];
    for (int64_t t = 0; t < c_.taps.count; ++t) shifts[t] = pitch.shift(c_.taps, t);
    TapShifts taps{shifts, c_.taps.count, 0, 0, pitch.pixel};
    taps.columns = c_.taps.regular_columns(&taps.spacing);
    SAPWOOD_ISA_CALL(multiply_depthwise(source, list_.offsets, list_.count, taps,
                                        static_cast<const T*>(weights_.get()),
                                        static_cast<const T*>(bias_), sums_.get()));
    store(block, kLine);
  }

  // Zeros in the windows at `plane` for the channels that are off.
  void clear_channels(const Block& block, const bool* on, int64_t group, int64_t plane) {
    int64_t at = 0;
    for (int32_t r = 0; r < block.runs; ++r) {
      for (int32_t c = 0; c < block.run[r].count; ++c, ++at) {
        if (on[(block.run[r].first + c) / group]) continue;
        for (int64_t i = 0; i < chunk_.last - chunk_.first; ++i) {
          T* line = windows_.get() + i * planes_ * shape_.plane() + plane + at;
          for (int64_t l = 0; l < shape_.rows * shape_.cols; ++l) line[l * kLine] = T(0);
        }
      }
    }
  }

  // Each block fetches its own outputs, and its share of the next chunk's pixels.
  void look_ahead(int64_t b) {
    ahead_list_.clear();
    ahead_list_.add_outputs(list_, outputs_[static_cast<size_t>(b)], c_.sink(sample_));
    if (c_.image.region == nullptr) {
      const auto blocks = static_cast<int64_t>(outputs_.size());
      const int64_t items = next_.last - next_.first;
      const auto sample = static_cast<size_t>(items_[static_cast<size_t>(next_.first)].sample);
      ahead_list_.add_sources(c_.image, c_.inputs[sample], items_, next_.first + items * b / blocks,
                              next_.first + items * (b + 1) / blocks, c_.taps, shape_);
    }
    ahead_ = ahead_list_.over(register_tiles(outputs_[static_cast<size_t>(b)]));
  }

  // About so many register tiles make the sums of a block: all pixels for each block of weights.
  int64_t register_tiles(const Block& block) const {
    int64_t channels = 0;
    for (const Block& line : inputs_) channels += line.count;
    const int64_t bytes = c_.taps.count * channels * block.count * static_cast<int64_t>(sizeof(T));
    return (1 + bytes / kWeightBytes) * (1 + list_.count / kMaxPixels);
  }

  // All input channels for the filters of one block, slice by slice.
  void multiply_block(const Block& block) {
    int64_t width = 0;
    SAPWOOD_ISA_CALL(width_of<T>(block.count, width));
    T bias[kMaxFilters] = {};
    int64_t at = 0;
    for (int32_t r = 0; c_.bias != nullptr && r < block.runs; ++r) {
      for (int32_t k = 0; k < block.run[r].count; ++k) bias[at++] = c_.bias[block.run[r].first + k];
    }
    const T* start = bias;
    const auto planes = static_cast<int64_t>(inputs_.size());
    for (int64_t first = 0; first < planes; first += planes_) {
      const int64_t count = std::min(planes_, planes - first);
      if (loaded_ != first) load_windows(inputs_.data() + first, count);
      loaded_ = first;
      multiply_slice(block, width, inputs_.data() + first, count, start);
      start = nullptr;
    }
    if (start != nullptr || c_.taps.count == 0) {  // nothing to add to the bias
      SAPWOOD_ISA_CALL(multiply(width, windows_.get(), list_.offsets, list_.count,
                                static_cast<const Segment*>(nullptr), 0, weights_.get(),
                                static_cast<const T*>(bias), sums_.get(), ahead_));
    }
    store(block, width);
  }

  // Weights of as many taps and lines as fit in L1 at a time.
  void multiply_slice(const Block& block, int64_t width, const Block* inputs, int64_t planes,
                      const T* start) {
    const int64_t most =
        std::max<int64_t>(kLine, kWeightBytes / (width * static_cast<int64_t>(sizeof(T))));
    Segment segments[kSegments];
    int64_t count = 0, rows = 0;
    const auto flush = [&] {
      SAPWOOD_ISA_CALL(multiply(width, windows_.get(), list_.offsets, list_.count,
                                static_cast<const Segment*>(segments), count, weights_.get(), start,
                                sums_.get(), ahead_));
      start = nullptr;
      count = rows = 0;
    };
    for (int64_t b = 0; b < planes; ++b) {
      for (int64_t t = 0; t < c_.taps.count; ++t) {
        if (count == kSegments || rows + inputs[b].count > most) flush();
        const auto plane = static_cast<int32_t>(b * shape_.plane());
        segments[count++] = {plane + shape_.pitch().shift(c_.taps, t), inputs[b].count};
        const int64_t size = c_.image.channels * c_.target.channels;
        const int64_t next = c_.taps.weight[std::min(t + 1, c_.taps.count - 1)];
        const T* from = c_.weights + c_.taps.weight[t] * size;
        SAPWOOD_ISA_CALL(pack_weight_rows(from, c_.target.channels,
                                          (next - c_.taps.weight[t]) * size, inputs[b], block,
                                          width, weights_.get() + rows * width));
        rows += inputs[b].count;
      }
    }
    if (count > 0) flush();
  }

  void store(const Block& block, int64_t width) {
    SAPWOOD_ISA_CALL(activate_all(sums_.get(), list_.count * width, c_.activation));
    SAPWOOD_ISA_CALL(store_pixels(static_cast<const T*>(sums_.get()), width, list_.places,
                                  list_.count, block, c_.sink(sample_)));
  }

  static constexpr int64_t kSegments = 128;

  const Convolution<S, T>& c_;
  const std::vector<Item>& items_;
  const Chunk chunk_, next_;
  const WindowShape shape_;
  const int64_t sample_;
  const std::vector<Block>& inputs_;
  const std::vector<Block>& outputs_;
  const int64_t planes_;  // of input channels that are loaded together
  int64_t loaded_ = -1;   // the first of those in the windows
  Scratch<T> windows_, sums_, weights_;
  T bias_[kLine];  // of a depthwise block
  AheadList ahead_list_;
  Ahead ahead_{nullptr, nullptr, 0};
  PixelList list_;
};

inline constexpr int64_t kEdge = 8;  // of an item: 64 pixels fill the register tile eight times

inline int64_t most_blocks(const ChannelBlocks& blocks) {
  size_t most = 1;
  for (const auto& sample : blocks) most = std::max(most, sample.size());
  return static_cast<int64_t>(most);
}

// f(work, sample) for chunks of the items. Together they write the wanted pixels of the channels in
// `outputs`; everything else is fill_skipped's.
template <class S, class T, class F>
void for_chunks(const Convolution<S, T>& c, const std::vector<Item>& items, int64_t edge,
                int64_t planes, double operations, const F& f) {
  const WindowShape shape(c.taps, edge);
  const std::vector<Chunk> chunks =
      chunks_of(items, kChunkPixels / (edge * edge),
                planes * shape.plane() * static_cast<int64_t>(sizeof(T)));
  const auto count = static_cast<int64_t>(chunks.size());
  const int64_t workers = useful_workers(count, operations);
  parallel_dynamic(count, workers, [&](int64_t, int64_t i) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    const auto sample = static_cast<size_t>(items[static_cast<size_t>(chunk.first)].sample);
    if (c.outputs[sample].empty()) return;
    const bool last = i + workers >= count;
    const Chunk next = last ? Chunk{0, 0} : chunks[static_cast<size_t>(i + workers)];
    ChunkWork<S, T> work(c, items, edge, chunk, next, planes);
    f(work, static_cast<int64_t>(sample));
  });
}

template <class S, class T>
void convolve(const Convolution<S, T>& c, int64_t edge, double operations) {
  const std::vector<Item> items = items_of(c.wanted, c.lattice, edge);
  for_chunks(c, items, edge, most_blocks(c.inputs), operations,
             [](ChunkWork<S, T>& work, int64_t) { work.run(); });
}

// Whether all source pixels of an item lie inside of the image.
inline bool is_inside(const Item& item, const Taps& taps, int64_t rows, int64_t cols) {
  const int64_t bottom = (item.y + item.rows - 1) * taps.step_y + taps.bottom;
  const int64_t right = (item.x + item.cols - 1) * taps.step_x + taps.right;
  return item.y * taps.step_y + taps.top >= 0 && bottom < rows &&
         item.x * taps.step_x + taps.left >= 0 && right < cols;
}

// Whether every block is a line of neighbouring channels.
inline bool whole_lines(const ChannelBlocks& blocks) {
  for (const auto& sample : blocks) {
    for (const Block& block : sample) {
      if (block.runs != 1 || block.count != kLine) return false;
    }
  }
  return true;
}

template <class S, class T>
void convolve_depthwise(const Convolution<S, T>& c, int64_t edge, const bool* inputs, int64_t group,
                        double operations) {
  const int64_t groups = c.target.channels / group, planes = most_blocks(c.outputs);
  std::vector<Item> items = items_of(c.wanted, c.lattice, edge);
  if constexpr (std::is_same_v<S, T>) {
    const int64_t elements = c.image.rows * c.image.cols * c.image.channels;
    if (c.image.region == nullptr && inputs == nullptr && whole_lines(c.outputs) &&
        elements <= std::numeric_limits<int32_t>::max()) {
      const auto inside = std::stable_partition(items.begin(), items.end(), [&](const Item& i) {
        return !is_inside(i, c.taps, c.image.rows, c.image.cols);
      });
      for_chunks(c, std::vector<Item>(inside, items.end()), edge, planes, operations,
                 [](ChunkWork<S, T>& work, int64_t) { work.run_inside(); });
      items.erase(inside, items.end());
    }
  }
  for_chunks(c, items, edge, planes, operations, [&](ChunkWork<S, T>& work, int64_t b) {
    work.run_depthwise(inputs == nullptr ? nullptr : inputs + b * groups, group);
  });
}

// The channels whose group is off, as runs of neighbours; on (groups,), or null for all.
inline void runs_off(const bool* on, int64_t groups, int64_t group, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t g = 0; on != nullptr && g < groups; ++g) {
    if (on[g]) continue;
    if (g == 0 || on[g - 1]) runs.push_back({static_cast<int32_t>(g * group), 0});
    runs.back().count += static_cast<int32_t>(group);
  }
}

// What is not computed: 0, or the residual bit for bit, written once.
template <class S>
void fill_skipped(const Target<S>& target, const Wanted& wanted, const bool* outputs,
                  int64_t group) {
  const int64_t channels = target.channels, groups = channels / group;
  const auto fill = [&](int64_t at, int64_t count) {
    if (target.residual == nullptr) {
      std::memset(static_cast<void*>(target.y + at), 0, static_cast<size_t>(count) * sizeof(S));
    } else {
      std::memcpy(static_cast<void*>(target.y + at), target.residual + at,
                  static_cast<size_t>(count) * sizeof(S));
    }
  };
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, wanted.cols * channels));
  parallel_range(wanted.batch * wanted.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<Run> skipped;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / wanted.rows;
      const uint8_t* row = wanted.row(b, r % wanted.rows);
      runs_off(outputs == nullptr ? nullptr : outputs + b * groups, groups, group, skipped);
      for (int64_t x = 0; x < wanted.cols;) {
        const int64_t pixel = (r * wanted.cols + x) * channels;
        int64_t run = x;
        while (run < wanted.cols && row[run] == row[x]) ++run;
        if (!row[x]) fill(pixel, (run - x) * channels);
        for (int64_t p = x; row[x] && p < run; ++p) {
          for (const Run& off : skipped) fill(pixel + (p - x) * channels + off.first, off.count);
        }
        x = run;
      }
    }
  });
}

}  // namespace sapwood::copruned_conv
