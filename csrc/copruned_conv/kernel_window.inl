// Moving pixels: windows in, results out. Compiled once per instruction set.
namespace sapwood::copruned_conv::SAPWOOD_ISA {

// Neighbouring channels; most runs are whole lines, so that these get a loop of fixed length.
template <class S, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void copy_run(const S* __restrict from, int64_t count,
                                            T* __restrict to) {
  for (; count >= kLine; count -= kLine, from += kLine, to += kLine) {
    for (int64_t c = 0; c < kLine; ++c) to[c] = static_cast<T>(from[c]);
  }
  for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(from[c]);
}

// One line: the channels of a block of one pixel, in the type of the sums.
template <class S, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void load_line(const S* pixel, const Block& block, T* line) {
  int64_t at = 0;
  for (int32_t r = 0; r < block.runs; ++r) {
    copy_run(pixel + block.run[r].first, block.run[r].count, line + at);
    at += block.run[r].count;
  }
  for (; at < kLine; ++at) line[at] = T(0);
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void clear_lines(T* line, int64_t pixels, int64_t planes,
                                               int64_t plane) {
  for (int64_t b = 0; b < planes; ++b) {
    std::memset(line + b * plane, 0, static_cast<size_t>(pixels * kLine) * sizeof(T));
  }
}

// Window (blocks, rows, cols, 16) of the image from pixel (y0, x0); zeros outside of the image and
// where its tiles are off.
template <class S, class T>
SAPWOOD_TARGET void load_window(const Image<S>& image, int64_t y0, int64_t x0, int64_t rows,
                                int64_t cols, const Block* blocks, int64_t planes, int64_t plane,
                                T* window) {
  const int64_t left = std::clamp<int64_t>(-x0, 0, cols);
  const int64_t right = std::clamp<int64_t>(image.cols - x0, left, cols);
  for (int64_t i = 0; i < rows; ++i, window += cols * kLine) {
    const int64_t y = y0 + i;
    if (y < 0 || y >= image.rows) {
      clear_lines(window, cols, planes, plane);
      continue;
    }
    clear_lines(window, left, planes, plane);
    clear_lines(window + right * kLine, cols - right, planes, plane);
    const int64_t across = (image.cols + image.tile - 1) / image.tile;
    const bool* region = image.region == nullptr ? nullptr : image.region + y / image.tile * across;
    const S* row = image.data + y * image.cols * image.channels;
    for (int64_t j = left; j < right; ++j) {
      T* line = window + j * kLine;
      if (region != nullptr && !region[(x0 + j) / image.tile]) {
        clear_lines(line, 1, planes, plane);
        continue;
      }
      const S* pixel = row + (x0 + j) * image.channels;
      for (int64_t b = 0; b < planes; ++b) load_line(pixel, blocks[b], line + b * plane);
    }
  }
}

// Rows of weights (count, N) for the filters of a block; `from` holds rows of all filters. The rows
// `following` elements on, those of the next tap, are fetched meanwhile: a large weight lies far away.
template <class T>
SAPWOOD_TARGET void pack_weight_rows(const T* from, int64_t filters, int64_t following,
                                     const Block& inputs, const Block& outputs, int64_t width,
                                     T* to) {
  for (int32_t r = 0; r < inputs.runs; ++r) {
    const T* row = from + inputs.run[r].first * filters;
    for (int32_t c = 0; c < inputs.run[r].count; ++c, row += filters, to += width) {
      int64_t at = 0;
      for (int32_t q = 0; q < outputs.runs; ++q) {
        const T* run = row + outputs.run[q].first;
        const char* after = reinterpret_cast<const char*>(run + following);
        __builtin_prefetch(after);
        __builtin_prefetch(after + 64);
        copy_run(run, outputs.run[q].count, to + at);
        at += outputs.run[q].count;
      }
      for (; at < width; ++at) to[at] = T(0);
    }
  }
}

template <class T>
SAPWOOD_TARGET void activate_all(T* values, int64_t count, Activation activation) {
  switch (activation) {  // outside of the loops, which are vectorised
    case Activation::none:
      return;
    case Activation::relu:
      for (int64_t i = 0; i < count; ++i) values[i] = activate(values[i], Activation::relu);
      return;
    case Activation::gelu:
      for (int64_t i = 0; i < count; ++i) values[i] = activate(values[i], Activation::gelu);
      return;
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) values[i] = activate(values[i], Activation::silu);
      return;
    case Activation::leaky_relu:
      for (int64_t i = 0; i < count; ++i) values[i] = activate(values[i], Activation::leaky_relu);
  }
}

// slopes (pixels, width): the filters of a block at each pixel's place.
template <class S, class T>
SAPWOOD_TARGET void gather_pixels(const S* gradient, int64_t channels, const int32_t* places,
                                  int64_t pixels, const Block& block, int64_t width, T* slopes) {
  for (int64_t p = 0; p < pixels; ++p) {
    const S* pixel = gradient + places[p] * channels;
    int64_t at = 0;
    for (int32_t r = 0; r < block.runs; ++r) {
      copy_run(pixel + block.run[r].first, block.run[r].count, slopes + at);
      at += block.run[r].count;
    }
    for (; at < width; ++at) slopes[at] = T(0);
    slopes += width;
  }
}

// values (pixels, width) to the filters of a block at each pixel's place, plus the residual there.
template <class S, class T>
SAPWOOD_TARGET void store_pixels(const T* values, int64_t width, const int32_t* places,
                                 int64_t pixels, const Block& block, const Target<S>& target) {
  for (int64_t p = 0; p < pixels; ++p, values += width) {
    const int64_t pixel = places[p] * target.channels;
    const T* from = values;
    for (int32_t r = 0; r < block.runs; ++r) {
      const int64_t at = pixel + block.run[r].first, count = block.run[r].count;
      S* to = target.y + at;
      if (target.residual == nullptr) {
        copy_run(from, count, to);
      } else {
        const S* add = target.residual + at;
        for (int64_t k = 0; k < count; ++k) {
          to[k] = static_cast<S>(from[k] + static_cast<T>(add[k]));
        }
      }
      from += count;
    }
  }
}

}  // namespace sapwood::copruned_conv::SAPWOOD_ISA
