// Gradients of weights and bias: sums over the wanted pixels. A task owns its weights and visits all
// pixels in order, so nothing depends on the number of threads.
#pragma once

#include "common/scratch.h"
#include "copruned_conv/cpu_list.h"

namespace sapwood::copruned_conv {

inline constexpr int64_t kGradientPixels = 64;  // of a chunk: windows, slopes and sums share L1

// Which groups of which sample take part; masks (batch, groups), null for all.
struct GroupMasks {
  const bool *filters, *inputs;
  int64_t group;

  const bool* filters_of(int64_t b, int64_t channels) const {
    return filters == nullptr ? nullptr : filters + b * (channels / group);
  }
  const bool* inputs_of(int64_t b, int64_t channels) const {
    return inputs == nullptr ? nullptr : inputs + b * (channels / group);
  }
};

template <class S, class T>
struct WeightGradient {
  Taps taps;
  Image<S> image;   // of sample 0, no region
  const S* slopes;  // (batch, rows, cols, filters)
  int64_t filters;
  const Wanted& wanted;
  GroupMasks masks;
  S* out;  // (filters, channels, taps), or (filters, 1, taps)

  Image<S> source(int64_t b) const {
    Image<S> one = image;
    one.data += b * image.rows * image.cols * image.channels;
    return one;
  }
  const S* sample_slopes(int64_t b) const {
    return slopes + b * wanted.rows * wanted.cols * filters;
  }
};

// Items and chunks of all samples, shared by the tasks.
template <class S>
struct GradientList {
  GradientList(const Taps& taps, const Wanted& wanted, int64_t edge, int64_t element_bytes)
      : lattice{wanted.rows, wanted.cols},
        shape(taps, edge),
        items(items_of(wanted, lattice, edge)),
        most(std::max<int64_t>(1, kGradientPixels / (edge * edge))),
        chunks(chunks_of(items, most, shape.plane() * element_bytes)) {}

  Lattice lattice;
  WindowShape shape;
  std::vector<Item> items;
  int64_t most;  // of a chunk
  std::vector<Chunk> chunks;

  int64_t sample(const Chunk& chunk) const {
    return items[static_cast<size_t>(chunk.first)].sample;
  }
};

// Adds the products of one chunk: windows of 16 channels, slopes of a block of filters.
template <class S, class T>
class GradientTask {
 public:
  GradientTask(const WeightGradient<S, T>& g, const GradientList<S>& list)
      : g_(g),
        list_(list),
        windows_(list.most * list.shape.plane()),
        slopes_((kGradientPixels + kMaxPixels) * kMaxFilters) {
    for (int64_t t = 0; t < g.taps.count; ++t) shifts_[t] = list.shape.pitch().shift(g.taps, t);
  }

  void load(const Chunk& chunk, const Block& inputs, const Block& filters, int64_t width) {
    const int64_t plane = list_.shape.plane(), b = list_.sample(chunk);
    const Image<S> image = g_.source(b);
    list_pixels(
        list_.items, chunk, g_.wanted, list_.lattice, g_.taps, list_.shape.pitch(),
        [&](const Item&, int64_t i) { return i * plane; }, pixels_);
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const Item& item = list_.items[static_cast<size_t>(i)];
      SAPWOOD_ISA_CALL(load_window(image, item.y * g_.taps.step_y + g_.taps.top,
                                   item.x * g_.taps.step_x + g_.taps.left, list_.shape.rows,
                                   list_.shape.cols, &inputs, 1, plane,
                                   windows_.get() + (i - chunk.first) * plane));
    }
    SAPWOOD_ISA_CALL(gather_pixels(g_.sample_slopes(b), g_.filters, pixels_.places, pixels_.count,
                                   filters, width, slopes_.get()));
  }

  void add(int64_t width, T* sums) {
    SAPWOOD_ISA_CALL(gradient(width, static_cast<const T*>(windows_.get()), pixels_.offsets,
                              pixels_.count, shifts_, g_.taps.count,
                              static_cast<const T*>(slopes_.get()), sums));
  }

  void add_depthwise(T* sums) {
    SAPWOOD_ISA_CALL(gradient_depthwise(static_cast<const T*>(windows_.get()), pixels_.offsets,
                                        pixels_.count, shifts_, g_.taps.count,
                                        static_cast<const T*>(slopes_.get()), sums));
  }

 private:
  const WeightGradient<S, T>& g_;
  const GradientList<S>& list_;
  int32_t shifts_[kMaxTaps];
  Scratch<T> windows_, slopes_;
  PixelList pixels_;
};

// to (taps, 16, width of the whole block) += from (taps, 16, width), whose rows and columns are the
// channels and filters that are on.
template <class T>
void scatter_add(const T* from, int64_t width, const Block& inputs, int64_t first_input,
                 const Block& filters, int64_t first_filter, int64_t taps, int64_t full, T* to) {
  for (int64_t t = 0; t < taps; ++t, from += kLine * width, to += kLine * full) {
    int64_t row = 0;
    for (int32_t r = 0; r < inputs.runs; ++r) {
      for (int32_t c = 0; c < inputs.run[r].count; ++c, ++row) {
        T* line = to + (inputs.run[r].first - first_input + c) * full;
        const T* sum = from + row * width;
        for (int32_t q = 0; q < filters.runs; ++q) {
          T* run = line + (filters.run[q].first - first_filter);
          for (int32_t k = 0; k < filters.run[q].count; ++k) run[k] += *sum++;
        }
      }
    }
  }
}

// The weights of filters [first, first + full) and 16 input channels.
template <class S, class T>
void gradient_block(const WeightGradient<S, T>& g, const GradientList<S>& list, int64_t first,
                    int64_t full, int64_t channel) {
  const int64_t size = g.taps.count * kLine * full;
  std::vector<T> total(static_cast<size_t>(size), T(0)), part(static_cast<size_t>(size));
  GradientTask<S, T> task(g, list);
  for (size_t i = 0; i < list.chunks.size();) {
    const int64_t b = list.sample(list.chunks[i]);
    const Block filters =
        block_at(g.masks.filters_of(b, g.filters), g.masks.group, g.filters, first, full);
    const Block inputs = block_at(g.masks.inputs_of(b, g.image.channels), g.masks.group,
                                  g.image.channels, channel, kLine);
    int64_t width = 0;
    SAPWOOD_ISA_CALL(width_of<T>(filters.count, width));
    const bool skip = filters.count == 0 || inputs.count == 0;
    std::fill(part.begin(), part.begin() + g.taps.count * kLine * width, T(0));
    for (; i < list.chunks.size() && list.sample(list.chunks[i]) == b; ++i) {
      if (skip) continue;
      task.load(list.chunks[i], inputs, filters, width);
      task.add(width, part.data());
    }
    if (skip) continue;
    scatter_add<T>(part.data(), width, inputs, channel, filters, first, g.taps.count, full,
                   total.data());
  }
  const int64_t last = std::min(first + full, g.filters);
  const int64_t last_channel = std::min(channel + kLine, g.image.channels);
  for (int64_t k = first; k < last; ++k) {
    for (int64_t c = channel; c < last_channel; ++c) {
      S* to = g.out + (k * g.image.channels + c) * g.taps.count;
      const T* from = total.data() + (c - channel) * full + k - first;
      for (int64_t t = 0; t < g.taps.count; ++t) to[t] = static_cast<S>(from[t * kLine * full]);
    }
  }
}

template <class S, class T>
void weight_gradient(const WeightGradient<S, T>& g, int64_t edge, double operations) {
  const int64_t full = filters_of_tile<T>();
  const int64_t across = (g.image.channels + kLine - 1) / kLine;
  const int64_t tasks = (g.filters + full - 1) / full * across;
  const GradientList<S> list(g.taps, g.wanted, edge, static_cast<int64_t>(sizeof(T)));
  parallel_dynamic(tasks, useful_workers(tasks, operations), [&](int64_t, int64_t t) {
    gradient_block(g, list, t / across * full, full, t % across * kLine);
  });
}

// The weights (taps) of 16 channels of a depthwise convolution.
template <class S, class T>
void gradient_line(const WeightGradient<S, T>& g, const GradientList<S>& list, int64_t channel) {
  std::vector<T> total(static_cast<size_t>(g.taps.count * kLine), T(0));
  GradientTask<S, T> task(g, list);
  std::vector<T> part(total.size());
  for (size_t i = 0; i < list.chunks.size();) {
    const int64_t b = list.sample(list.chunks[i]);
    const Block filters =
        block_at(g.masks.filters_of(b, g.filters), g.masks.group, g.filters, channel, kLine);
    const bool* inputs = g.masks.inputs_of(b, g.image.channels);
    std::fill(part.begin(), part.end(), T(0));
    for (; i < list.chunks.size() && list.sample(list.chunks[i]) == b; ++i) {
      if (filters.count == 0) continue;
      task.load(list.chunks[i], filters, filters, kLine);
      task.add_depthwise(part.data());
    }
    int64_t at = 0;
    for (int32_t r = 0; r < filters.runs; ++r) {
      for (int32_t c = 0; c < filters.run[r].count; ++c, ++at) {
        const int64_t k = filters.run[r].first + c;
        if (inputs != nullptr && !inputs[k / g.masks.group]) continue;
        for (int64_t t = 0; t < g.taps.count; ++t) {
          total[static_cast<size_t>(t * kLine + k - channel)] +=
              part[static_cast<size_t>(t * kLine + at)];
        }
      }
    }
  }
  for (int64_t k = channel; k < std::min(channel + kLine, g.filters); ++k) {
    for (int64_t t = 0; t < g.taps.count; ++t) {
      g.out[k * g.taps.count + t] =
          static_cast<S>(total[static_cast<size_t>(t * kLine + k - channel)]);
    }
  }
}

template <class S, class T>
void weight_gradient_depthwise(const WeightGradient<S, T>& g, int64_t edge, double operations) {
  const int64_t tasks = (g.filters + kLine - 1) / kLine;
  const GradientList<S> list(g.taps, g.wanted, edge, static_cast<int64_t>(sizeof(T)));
  parallel_dynamic(tasks, useful_workers(tasks, operations),
                   [&](int64_t, int64_t t) { gradient_line(g, list, t * kLine); });
}

// out (filters,): sums over the wanted pixels of the filters that are on, in double.
template <class S, class T>
void bias_gradient(const WeightGradient<S, T>& g, S* out) {
  const int64_t tasks = (g.filters + kLine - 1) / kLine;
  parallel_range(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      double total[kLine] = {};
      const int64_t first = line * kLine;
      for (int64_t b = 0; b < g.wanted.batch; ++b) {
        const Block block =
            block_at(g.masks.filters_of(b, g.filters), g.masks.group, g.filters, first, kLine);
        const S* slopes = g.sample_slopes(b);
        for (int64_t p = 0; p < g.wanted.rows * g.wanted.cols; ++p) {
          if (!g.wanted.row(b, 0)[p]) continue;
          const S* pixel = slopes + p * g.filters;
          for (int32_t r = 0; r < block.runs; ++r) {
            for (int32_t k = 0; k < block.run[r].count; ++k) {
              const int64_t filter = block.run[r].first + k;
              total[filter - first] += static_cast<double>(pixel[filter]);
            }
          }
        }
      }
      for (int64_t k = first; k < std::min(first + kLine, g.filters); ++k) {
        out[k] = static_cast<S>(total[k - first]);
      }
    }
  });
}

}  // namespace sapwood::copruned_conv
