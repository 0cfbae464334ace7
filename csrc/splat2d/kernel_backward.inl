// The derivatives of one Gaussian, all sums in registers. Compiled once per instruction set.
namespace sapwood::splat2d::SAPWOOD_ISA {

// to[x] = from[x step], zero up to the end of the padding; clears `finite` where a value is not.
template <class T>
SAPWOOD_TARGET void copy_row(const T* __restrict from, int64_t step, int64_t width,
                             T* __restrict to, bool& finite) {
  if (step == 1) {
    std::copy_n(from, width, to);
  } else {
    for (int64_t x = 0; x < width; ++x) to[x] = from[x * step];
  }
  std::fill_n(to + width, kPad, T(0));
  constexpr T most = std::numeric_limits<T>::max();
  int bad = 0;
  for (int64_t x = 0; x < width; ++x) bad |= !(to[x] <= most && to[x] >= -most);
  finite = finite && bad == 0;
}

// Moments of s = w <feat, grad> over all pixels, lane by lane.
template <class T>
struct Moments {
  typename Lanes<T>::type u{}, v{}, uu{}, uv{}, vv{}, abs_x{}, abs_y{};
};

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void magnitude(typename Lanes<T>::type& v) {
  v = v < 0 ? -v : v;
}

// A block of columns down its rows. u is constant in a lane, so that three sums over the rows give
// five moments. `slopes` holds the sums of w grad, one vector per channel. Unless all is `plain`, what
// is not finite outside the cut must not meet a weight of zero.
template <int C, bool plain, bool stats, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void add_block(const Gaussian<T>& g, const T* feat,
                                             const Rows<T>& rows, uint32_t reached, int64_t at,
                                             const T* from, int64_t channels, int64_t pitch,
                                             Moments<T>& moments,
                                             typename Lanes<T>::type* __restrict slopes) {
  using V = typename Lanes<T>::type;
  const T limit = g.limit;
  V x;
  columns_from<T>(at, x);
  V u = (x - g.mx) * g.per_x;
  const V uu = u * u, ku = g.skew * u;
  if constexpr (!plain) u = uu - uu == 0 ? u : V{};
  V s_sum{}, sv_sum{}, svv_sum{};
  const int begin = __builtin_ctz(reached), end = 32 - __builtin_clz(reached);
  from += begin * channels * pitch + at;
  for (int r = begin; r < end; ++r, from += channels * pitch) {
    V v = rows.e[r] - ku;
    const V q = v * v + uu;
    V w;
    exp2_of_minus<T>(w, q);
    w = q <= limit ? w : V{};
    if constexpr (!plain) v = q <= limit ? v : V{};
    V dot{};
    for (int64_t c = 0; c < channels; ++c) {
      V grad;
      load<T>(grad, from + c * pitch);
      if constexpr (!plain) grad = q <= limit ? grad : V{};
      dot += grad * feat[c];
      slopes[c] += w * grad;
    }
    if constexpr (!plain) dot = q <= limit ? dot : V{};
    const V s = w * dot, sv = s * v;
    s_sum += s;
    sv_sum += sv;
    svv_sum += sv * v;
    if constexpr (stats) {
      V x_part = s * (u - g.skew * v), y_part = sv;
      magnitude<T>(x_part);
      magnitude<T>(y_part);
      moments.abs_x += x_part;
      moments.abs_y += y_part;
    }
  }
  const V us = u * s_sum;
  moments.u += us;
  moments.uu += us * u;
  moments.v += sv_sum;
  moments.uv += u * sv_sum;
  moments.vv += svv_sum;
}

template <class T, bool stats>
SAPWOOD_TARGET SAPWOOD_INLINE void write_slopes(const Gaussian<T>& g, const Moments<T>& m,
                                                const Slopes<T>& to) {
  constexpr T back = static_cast<T>(1 / kScale);  // moments of the scaled u and v
  const T u = sum_lanes<T>(m.u) * back, v = sum_lanes<T>(m.v) * back;
  const T uu = sum_lanes<T>(m.uu) * back, uv = sum_lanes<T>(m.uv) * back;
  const T vv = sum_lanes<T>(m.vv) * back;
  const T per_x = g.per_x * back, per_y = g.per_y * back;  // 1 / l1 and 1 / l3
  to.mu[0] = (u - g.skew * v) * per_x;
  to.mu[1] = v * per_y;
  to.chol[0] = (uu - g.skew * uv) * back * per_x;
  to.chol[1] = uv * back * per_y;
  to.chol[2] = vv * back * per_y;
  if constexpr (stats) {
    to.abs_mu[0] = sum_lanes<T>(m.abs_x) * back * per_x;
    to.abs_mu[1] = sum_lanes<T>(m.abs_y) * back * per_y;
  }
}

template <int C, bool plain, bool stats, class T>
SAPWOOD_TARGET SAPWOOD_OUTLINE void differentiate_of(const Gaussian<T>& g, const T* feat,
                                                     const Gradient<T>& image, T* scratch,
                                                     const Slopes<T>& to) {
  using V = typename Lanes<T>::type;
  constexpr int L = Lanes<T>::count;
  const int64_t channels = C > 0 ? C : image.channels;
  Moments<T> moments;
  V own[C > 0 ? C : 1] = {};
  V* slopes = C > 0 ? own : reinterpret_cast<V*>(scratch);
  for (int64_t c = 0; c < channels; ++c) slopes[c] = V{};
  for (int64_t top = g.top; top < g.bottom; top += kBand) {
    Rows<T> rows;
    solve_rows(g, top, static_cast<int>(std::min<int64_t>(kBand, g.bottom - top)), rows);
    int64_t first, last;
    columns_of(rows, image.width, first, last);
    const T* from = image.pixels + top * channels * image.pitch;
    for (int64_t at = first; at <= last; at += L) {
      const uint32_t reached = rows_reaching(rows, static_cast<T>(at), static_cast<T>(at + L - 1));
      if (reached == 0) continue;
      add_block<C, plain, stats>(g, feat, rows, reached, at, from, channels, image.pitch, moments,
                                 slopes);
    }
  }
  write_slopes<T, stats>(g, moments, to);
  for (int64_t c = 0; c < channels; ++c) to.feat[c] = sum_lanes<T>(slopes[c]);
}

// What is not plain is rare and has one copy for any number of channels.
template <int C, class T>
SAPWOOD_TARGET void differentiate_channels(const Gaussian<T>& g, const T* feat,
                                           const Gradient<T>& image, T* scratch,
                                           const Slopes<T>& to) {
  T zero = 0;  // NaN if a feature is not finite
  for (int64_t c = 0; c < (C > 0 ? C : image.channels); ++c) zero += feat[c] * T(0);
  const bool plain = image.finite && zero == 0 && !g.extreme;
  if (to.abs_mu != nullptr) {
    if (plain) return differentiate_of<C, true, true>(g, feat, image, scratch, to);
    return differentiate_of<0, false, true>(g, feat, image, scratch, to);
  }
  if (plain) return differentiate_of<C, true, false>(g, feat, image, scratch, to);
  return differentiate_of<0, false, false>(g, feat, image, scratch, to);
}

// scratch: room for channels * kPad elements, aligned to a cache line.
template <class T>
SAPWOOD_TARGET void differentiate(const Gaussian<T>& g, const T* feat, const Gradient<T>& image,
                                  T* scratch, const Slopes<T>& to) {
  switch (image.channels) {
    case 1:
      return differentiate_channels<1>(g, feat, image, scratch, to);
    case 3:
      return differentiate_channels<3>(g, feat, image, scratch, to);
    case 4:
      return differentiate_channels<4>(g, feat, image, scratch, to);
    default:
      return differentiate_channels<0>(g, feat, image, scratch, to);
  }
}

}  // namespace sapwood::splat2d::SAPWOOD_ISA
