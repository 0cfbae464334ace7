// One input channel per filter: vectors over the 16 channels of a line, taps in a loop. Compiled once
// per instruction set.
namespace sapwood::copruned_conv::SAPWOOD_ISA {

inline constexpr int kDepthwisePixels = 8;

template <class T>
struct Line {
  static constexpr int lanes = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  static constexpr int vectors = static_cast<int>(kLine) / lanes;
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
};

// 8 pixels with their own offsets.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void scattered_pixels(const T* window, const int32_t* offsets,
                                                    const TapShifts& taps, const T* weights,
                                                    const T* bias, T* sums) {
  using L = Line<T>;
  const T* pixel[kDepthwisePixels];
#pragma GCC unroll 16
  for (int p = 0; p < kDepthwisePixels; ++p) pixel[p] = window + offsets[p];
  typename L::type acc[kDepthwisePixels];
#pragma GCC unroll 16
  for (int p = 0; p < kDepthwisePixels; ++p) acc[p] = load_vector(bias);
  for (int64_t t = 0; t < taps.count; ++t) {
    const typename L::type w = load_vector(weights + t * kLine);
    const int64_t at = taps.shifts[t];
#pragma GCC unroll 16
    for (int p = 0; p < kDepthwisePixels; ++p) acc[p] += load_vector(pixel[p] + at) * w;
  }
#pragma GCC unroll 16
  for (int p = 0; p < kDepthwisePixels; ++p) store_vector(sums + p * kLine, acc[p]);
}

// 8 neighbouring pixels of a row: every line is loaded once for all the taps of a row that use it.
template <int C, int S, class T>
SAPWOOD_TARGET void neighbouring_pixels(const T* pixel, const TapShifts& taps, const T* weights,
                                        const T* bias, T* sums) {
  using L = Line<T>;
  constexpr int kLines = kDepthwisePixels + (C - 1) * S;
  typename L::type acc[kDepthwisePixels];
#pragma GCC unroll 16
  for (int p = 0; p < kDepthwisePixels; ++p) acc[p] = load_vector(bias);
  for (int64_t t = 0; t < taps.count; t += C, weights += C * kLine) {
    const T* row = pixel + taps.shifts[t];
    typename L::type w[C];
#pragma GCC unroll 16
    for (int s = 0; s < C; ++s) w[s] = load_vector(weights + s * kLine);
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) {
      const typename L::type x = load_vector(row + i * taps.pitch);
#pragma GCC unroll 16
      for (int s = 0; s < C; ++s) {
        const int p = i - s * S;
        if (p >= 0 && p < kDepthwisePixels) acc[p] += x * w[s];
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kDepthwisePixels; ++p) store_vector(sums + p * kLine, acc[p]);
}

template <class T>
using NeighbourKernel = void (*)(const T*, const TapShifts&, const T*, const T*, T*);

template <int C, class T>
SAPWOOD_TARGET NeighbourKernel<T> kernel_of_spacing(int64_t spacing) {
  switch (spacing) {
    case 1:
      return neighbouring_pixels<C, 1, T>;
    case 2:
      return neighbouring_pixels<C, 2, T>;
    case 3:
      return neighbouring_pixels<C, 3, T>;
    default:
      return nullptr;
  }
}

template <class T>
SAPWOOD_TARGET NeighbourKernel<T> kernel_of(const TapShifts& taps) {
  switch (taps.columns) {
    case 3:
      return kernel_of_spacing<3, T>(taps.spacing);
    case 5:
      return kernel_of_spacing<5, T>(taps.spacing);
    case 7:
      return kernel_of_spacing<7, T>(taps.spacing);
    default:
      return nullptr;
  }
}

// Weights (taps, 16) of a block from those of all channels (taps of the kernel, channels).
template <class T>
SAPWOOD_TARGET void pack_filters(const T* weights, int64_t channels, const Taps& taps,
                                 const Block& block, T* to) {
  for (int64_t t = 0; t < taps.count; ++t, to += kLine) {
    load_line(weights + taps.weight[t] * channels, block, to);
  }
}

// sums (pixels, 16); weights (taps, 16). Offsets and sums have room for a whole group at the end. The
// order of additions is the same on both ways.
template <class T>
SAPWOOD_TARGET void multiply_depthwise(const T* window, const int32_t* offsets, int64_t pixels,
                                       const TapShifts& taps, const T* weights, const T* bias,
                                       T* sums) {
  using L = Line<T>;
  const NeighbourKernel<T> neighbours = kernel_of<T>(taps);
  for (int64_t first = 0; first < pixels; first += kDepthwisePixels) {
    const int32_t* at = offsets + first;
    const bool together = at[kDepthwisePixels - 1] - at[0] == (kDepthwisePixels - 1) * taps.pitch;
    for (int v = 0; v < L::vectors; ++v) {
      const int64_t lane = v * L::lanes;
      T* out = sums + first * kLine + lane;
      if (neighbours != nullptr && together) {
        neighbours(window + at[0] + lane, taps, weights + lane, bias + lane, out);
      } else {
        scattered_pixels(window + lane, at, taps, weights + lane, bias + lane, out);
      }
    }
  }
}

// out (taps, 16) += over the pixels: window at the offset and the tap x slope, slopes (pixels, 16).
template <class T>
SAPWOOD_TARGET void gradient_depthwise(const T* window, const int32_t* offsets, int64_t pixels,
                                       const int32_t* shifts, int64_t taps, const T* slopes,
                                       T* out) {
  using L = Line<T>;
  constexpr int kTogether = 8;
  for (int64_t first = 0; first < taps; first += kTogether) {
    const T* from[kTogether];
#pragma GCC unroll 16
    for (int t = 0; t < kTogether; ++t) {
      from[t] = window + shifts[std::min<int64_t>(first + t, taps - 1)];
    }
    for (int v = 0; v < L::vectors; ++v) {
      typename L::type acc[kTogether];
#pragma GCC unroll 16
      for (int t = 0; t < kTogether; ++t) acc[t] = typename L::type{};
      for (int64_t p = 0; p < pixels; ++p) {
        const typename L::type g = load_vector(slopes + p * kLine + v * L::lanes);
        const int64_t at = offsets[p] + v * L::lanes;
#pragma GCC unroll 16
        for (int t = 0; t < kTogether; ++t) acc[t] += load_vector(from[t] + at) * g;
      }
      for (int t = 0; t < std::min<int64_t>(kTogether, taps - first); ++t) {
        T* to = out + (first + t) * kLine + v * L::lanes;
        store_vector(to, load_vector(to) + acc[t]);
      }
    }
  }
}

}  // namespace sapwood::copruned_conv::SAPWOOD_ISA
