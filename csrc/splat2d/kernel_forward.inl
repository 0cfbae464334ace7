// Gaussians added to a band of rows, and pixels counted. Compiled once per instruction set.
namespace sapwood::splat2d::SAPWOOD_ISA {

// Adds one Gaussian; C channels, 0: as many as the band has. Where a feature is not finite, pixels
// outside the cut must not see it.
template <int C, bool finite, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void draw(const Gaussian<T>& g, const T* feat, const Band<T>& band) {
  using V = typename Lanes<T>::type;
  constexpr int L = Lanes<T>::count;
  // Copies: what is written may alias everything.
  const int64_t channels = C > 0 ? C : band.channels, pitch = band.pitch;
  const int64_t row_step = channels * pitch;
  const T mx = g.mx, per_x = g.per_x, skew = g.skew, limit = g.limit;
  T* const pixels = band.pixels;
  Rows<T> rows;
  solve_rows(g, band.first, static_cast<int>(band.rows), rows);
  int64_t first, last;
  columns_of(rows, band.width, first, last);
  T f[C > 0 ? C : 1];
  for (int c = 0; c < C; ++c) f[c] = feat[c];
  for (int64_t at = first; at <= last; at += L) {
    const uint32_t reached = rows_reaching(rows, static_cast<T>(at), static_cast<T>(at + L - 1));
    if (reached == 0) continue;
    V x;
    columns_from<T>(at, x);
    const V u = (x - mx) * per_x, uu = u * u, ku = skew * u;
    const int begin = __builtin_ctz(reached), end = 32 - __builtin_clz(reached);
    T* to = pixels + begin * row_step + at;
    for (int r = begin; r < end; ++r, to += row_step) {
      const V v = rows.e[r] - ku, q = v * v + uu;
      V w;
      exp2_of_minus<T>(w, q);
      w = q <= limit ? w : V{};
      for (int64_t c = 0; c < channels; ++c) {
        V sum;
        load<T>(sum, to + c * pitch);
        const V more = w * (C > 0 ? f[C > 0 ? c : 0] : feat[c]);
        sum += finite ? more : q <= limit ? more : V{};
        store<T>(to + c * pitch, sum);
      }
    }
  }
}

// Rare: one copy for any number of channels.
template <class T>
SAPWOOD_TARGET SAPWOOD_OUTLINE void draw_carefully(const Gaussian<T>& g, const T* feat,
                                                   const Band<T>& band) {
  draw<0, false>(g, feat, band);
}

template <int C, class T>
SAPWOOD_TARGET SAPWOOD_OUTLINE void draw_all_of(const Gaussian<T>* gaussians, const T* feat,
                                                const int32_t* ids, int64_t count,
                                                const Band<T>& band) {
  for (int64_t i = 0; i < count; ++i) {
    const T* f = feat + ids[i] * band.channels;
    T zero = 0;
    for (int64_t c = 0; c < (C > 0 ? C : band.channels); ++c) zero += f[c] * T(0);
    if (zero == 0) {
      draw<C, true>(gaussians[ids[i]], f, band);
    } else {
      draw_carefully(gaussians[ids[i]], f, band);
    }
  }
}

// Adds the Gaussians of a list, in its order; feat (N, channels) contiguous.
template <class T>
SAPWOOD_TARGET void draw_all(const Gaussian<T>* gaussians, const T* feat, const int32_t* ids,
                             int64_t count, const Band<T>& band) {
  switch (band.channels) {
    case 1:
      return draw_all_of<1>(gaussians, feat, ids, count, band);
    case 3:
      return draw_all_of<3>(gaussians, feat, ids, count, band);
    case 4:
      return draw_all_of<4>(gaussians, feat, ids, count, band);
    default:
      return draw_all_of<0>(gaussians, feat, ids, count, band);
  }
}

// Pixels of an image with u^2 + v^2 <= limit.
template <class T>
SAPWOOD_TARGET void count_pixels(const Gaussian<T>& g, int64_t width, int64_t& total) {
  using V = typename Lanes<T>::type;
  using I = typename Lanes<T>::bits_type;
  constexpr int L = Lanes<T>::count;
  const V end = V{} + static_cast<T>(width - 1);
  for (int64_t top = g.top; top < g.bottom; top += kBand) {
    Rows<T> rows;
    solve_rows(g, top, static_cast<int>(std::min<int64_t>(kBand, g.bottom - top)), rows);
    int64_t first, last;
    columns_of(rows, width, first, last);
    for (int64_t at = first; at <= last; at += L) {
      const uint32_t reached = rows_reaching(rows, static_cast<T>(at), static_cast<T>(at + L - 1));
      if (reached == 0) continue;
      V x;
      columns_from<T>(at, x);
      const V u = (x - g.mx) * g.per_x, uu = u * u, ku = g.skew * u;
      I inside{};
      for (int r = __builtin_ctz(reached), to = 32 - __builtin_clz(reached); r < to; ++r) {
        const V v = rows.e[r] - ku, q = v * v + uu;
        inside += (q <= g.limit) & (x <= end);
      }
      for (int i = 0; i < L; ++i) total -= inside[i];
    }
  }
}

}  // namespace sapwood::splat2d::SAPWOOD_ISA
