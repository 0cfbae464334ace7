// The register tiles: pixels x filters for the sums of a convolution, channels x filters for the
// gradient of its weights. Compiled once per instruction set.
namespace sapwood::copruned_conv::SAPWOOD_ISA {

template <class T>
struct Registers {
  static constexpr int lanes = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  static constexpr int vectors = 2;  // of filters
  // 32 registers: 16 sums, 2 vectors of weights, one pixel; more pixels would need more pointers
  // than there are. 16 registers: 12, 2 and 1.
  static constexpr int pixels = SAPWOOD_IS_AVX512 ? 8 : SAPWOOD_VECTOR_BYTES == 32 ? 6 : 4;
  static constexpr int channels = SAPWOOD_IS_AVX512 ? 8 : 4;  // of the weights' gradient
  static constexpr int filters = vectors * lanes;
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  static_assert(pixels <= kMaxPixels && filters <= kMaxFilters && kLine % channels == 0);
};

template <class T>
SAPWOOD_TARGET void tile_filters(int64_t& filters) {
  filters = Registers<T>::filters;
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE typename Registers<T>::type load_vector(const T* from) {
  typename Registers<T>::type v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void store_vector(T* to, typename Registers<T>::type v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// sums (pixels of the tile, V vectors) += windows at the pixels' offsets x weights.
template <int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void multiply_tile(const T* windows, const int32_t* offsets,
                                                 const Segment* segments, int64_t count,
                                                 const T* weights, const T* start, int64_t pitch,
                                                 T* out) {
  using R = Registers<T>;
  typename R::type sums[R::pixels][V];
  const T* pixel[R::pixels];
#pragma GCC unroll 16
  for (int p = 0; p < R::pixels; ++p) {
    pixel[p] = windows + offsets[p];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[p][v] = load_vector(start + p * pitch + v * R::lanes);
  }
  for (int64_t s = 0; s < count; ++s) {
    int64_t at = segments[s].offset;
    for (const int64_t end = at + segments[s].count; at < end; ++at) {
      typename R::type w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load_vector(weights + v * R::lanes);
      weights += V * R::lanes;
#pragma GCC unroll 16
      for (int p = 0; p < R::pixels; ++p) {
        const T x = pixel[p][at];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[p][v] += x * w[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < R::pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_vector(out + p * V * R::lanes + v * R::lanes, sums[p][v]);
  }
}

SAPWOOD_TARGET SAPWOOD_INLINE void fetch_lines(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.lines && ahead.next != ahead.end; ++i) {
    __builtin_prefetch(ahead.next->at, 0, 2);
    ahead.next->at += 64;
    if (ahead.next->at >= ahead.next->end) ++ahead.next;
  }
}

// Sums (pixels, V vectors) of all pixels of a chunk. They begin with the bias (start), or go on from
// what `sums` holds (start null). Offsets and sums have room for a
// whole tile at the end.
template <int V, class T>
SAPWOOD_TARGET void multiply_pixels(const T* windows, const int32_t* offsets, int64_t pixels,
                                    const Segment* segments, int64_t count, const T* weights,
                                    const T* start, T* sums, Ahead& ahead) {
  using R = Registers<T>;
  for (int64_t p = 0; p < pixels; p += R::pixels) {
    T* tile = sums + p * V * R::lanes;
    fetch_lines(ahead);
    multiply_tile<V>(windows, offsets + p, segments, count, weights,
                     start == nullptr ? tile : start, start == nullptr ? V * R::lanes : 0, tile);
  }
}

template <class T>
SAPWOOD_TARGET void multiply(int64_t width, const T* windows, const int32_t* offsets,
                             int64_t pixels, const Segment* segments, int64_t count,
                             const T* weights, const T* start, T* sums, Ahead& ahead) {
  if (width == Registers<T>::lanes) {
    multiply_pixels<1>(windows, offsets, pixels, segments, count, weights, start, sums, ahead);
  } else {
    multiply_pixels<2>(windows, offsets, pixels, segments, count, weights, start, sums, ahead);
  }
}

// One vector of filters suffices for narrow blocks.
template <class T>
SAPWOOD_TARGET void width_of(int64_t filters, int64_t& width) {
  width = filters <= Registers<T>::lanes ? Registers<T>::lanes : Registers<T>::filters;
}

// gradient (channels of a tap, V vectors) += over pixels: window at the offset x slope.
template <int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void gradient_tile(const T* window, const int32_t* offsets,
                                                 int64_t pixels, const T* slopes, T* gradient) {
  using R = Registers<T>;
  typename R::type sums[R::channels][V];
#pragma GCC unroll 16
  for (int c = 0; c < R::channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[c][v] = typename R::type{};
  }
  for (int64_t p = 0; p < pixels; ++p, slopes += V * R::lanes) {
    const T* x = window + offsets[p];
    typename R::type g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[v] = load_vector(slopes + v * R::lanes);
#pragma GCC unroll 16
    for (int c = 0; c < R::channels; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[c][v] += x[c] * g[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < R::channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* at = gradient + c * V * R::lanes + v * R::lanes;
      store_vector(at, load_vector(at) + sums[c][v]);
    }
  }
}

// gradient (taps, 16, width) += sums over the pixels of a chunk; `shifts` are the taps' offsets.
template <class T>
SAPWOOD_TARGET void gradient(int64_t width, const T* window, const int32_t* offsets, int64_t pixels,
                             const int32_t* shifts, int64_t taps, const T* slopes, T* out) {
  using R = Registers<T>;
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < kLine; c += R::channels) {
      const T* from = window + shifts[t] + c;
      T* to = out + (t * kLine + c) * width;
      if (width == R::lanes) {
        gradient_tile<1>(from, offsets, pixels, slopes, to);
      } else {
        gradient_tile<2>(from, offsets, pixels, slopes, to);
      }
    }
  }
}

}  // namespace sapwood::copruned_conv::SAPWOOD_ISA
