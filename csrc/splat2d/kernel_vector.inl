// Vectors, 2^-x, and the columns that the rows of a group can reach. Compiled once per instruction
// set.
namespace sapwood::splat2d::SAPWOOD_ISA {

template <class T>
struct Lanes {
  static constexpr int count = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  using bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef bits bits_type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  static_assert(count <= kPad);
};

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void load(typename Lanes<T>::type& v, const T* from) {
  __builtin_memcpy(&v, from, sizeof v);
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void store(T* to, const typename Lanes<T>::type& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE T sum_lanes(const typename Lanes<T>::type& v) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 8)
    return _mm512_reduce_add_pd((__m512d)v);
  else
    return _mm512_reduce_add_ps((__m512)v);
#else
  T lanes[Lanes<T>::count];
  store<T>(lanes, v);
  for (int h = Lanes<T>::count / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lanes[i] += lanes[i + h];
  }
  return lanes[0];
#endif
}

template <class T>
struct Exp2;

// 2^f for |f| <= 1/2, exact at 0, relative error 2e-7 and 1e-16; `magic` rounds to an integer and
// leaves it, plus the exponent's bias, in the low bits. `above` is 2^f for 0 <= f <= 1.
template <>
struct Exp2<float> {
  static constexpr float magic = 0x1.8p+23f + 127.0f;
  static constexpr int mantissa = 23, degree = 5;
  static constexpr float c[] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9bcp-3f,
                                0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
  static constexpr float above[] = {1.0f,           0x1.62e4bap-1f, 0x1.ebdb56p-3f,
                                    0x1.c91ce6p-5f, 0x1.277856p-7f, 0x1.e974fap-10f};
};
template <>
struct Exp2<double> {
  static constexpr double magic = 0x1.8p+52 + 1023.0;
  static constexpr int mantissa = 52, degree = 11;
  static constexpr double c[] = {1.0,
                                 0x1.62e42fefa39efp-1,
                                 0x1.ebfbdff82c5afp-3,
                                 0x1.c6b08d704a0cap-5,
                                 0x1.3b2ab6fb9f181p-7,
                                 0x1.5d87fe78a37bdp-10,
                                 0x1.4309131131bf6p-13,
                                 0x1.ffcbfc6fc4bc5p-17,
                                 0x1.62bfc2bc9c677p-20,
                                 0x1.b524e787e1580p-24,
                                 0x1.e6229e3c1c3ccp-28,
                                 0x1.e9f2b46af58d5p-32};
};

// w = 2^-x for 0 <= x within the limit of a Cut; any number elsewhere.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void exp2_of_minus(typename Lanes<T>::type& w,
                                                 const typename Lanes<T>::type& x) {
  using V = typename Lanes<T>::type;
  using I = typename Lanes<T>::bits_type;
  using E = Exp2<T>;
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 4) {
    const V y = -x;
    const V f = (V)_mm512_reduce_ps((__m512)y, 1);  // y - floor(y)
    V p = V{} + E::above[E::degree];
#pragma GCC unroll 16
    for (int i = E::degree - 1; i >= 0; --i) p = p * f + E::above[i];
    w = (V)_mm512_scalef_ps((__m512)p, (__m512)y);  // p 2^floor(y)
    return;
  }
#endif
  const V shifted = E::magic - x;
  const V f = (E::magic - shifted) - x;
  V p = V{} + E::c[E::degree];
#pragma GCC unroll 16
  for (int i = E::degree - 1; i >= 0; --i) p = p * f + E::c[i];
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= E::mantissa;
  V scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  w = p * scale;
}

// Prepares `exists` of n Gaussians; the others are not drawn.
template <class T>
SAPWOOD_TARGET void prepare_all(const T* mu, const T* chol, int64_t begin, int64_t end,
                                int64_t exists, int64_t height, int64_t width, const Cut& cut,
                                Gaussian<T>* to) {
  for (int64_t i = begin; i < std::min(end, exists); ++i) {
    to[i] = prepare(mu + 2 * i, chol + 3 * i, height, width, cut);
  }
  for (int64_t i = std::max(begin, exists); i < end; ++i) to[i] = Gaussian<T>{};
}

// The columns [low, high] that each row of a group can reach, and its e.
template <class T>
struct Rows {
  alignas(64) T e[kBand], low[kBand], high[kBand];
  T least, most;  // over all rows
};

// The least of `low` and the most of `high`, as a tree.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void extremes(Rows<T>& rows) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 4) {
    rows.least = _mm512_reduce_min_ps(_mm512_load_ps(rows.low));
    rows.most = _mm512_reduce_max_ps(_mm512_load_ps(rows.high));
    return;
  }
#endif
  T low[kBand / 2], high[kBand / 2];
  for (int r = 0; r < kBand / 2; ++r) {
    low[r] = rows.low[r] < rows.low[r + kBand / 2] ? rows.low[r] : rows.low[r + kBand / 2];
    high[r] = rows.high[r] > rows.high[r + kBand / 2] ? rows.high[r] : rows.high[r + kBand / 2];
  }
  for (int h = kBand / 4; h > 0; h /= 2) {
    for (int r = 0; r < h; ++r) {
      low[r] = low[r] < low[r + h] ? low[r] : low[r + h];
      high[r] = high[r] > high[r + h] ? high[r] : high[r + h];
    }
  }
  rows.least = low[0];
  rows.most = high[0];
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void solve_rows(const Gaussian<T>& g, int64_t first, int count,
                                              Rows<T>& rows) {
  constexpr T far = std::numeric_limits<T>::max();
  const T start = static_cast<T>(first);
  for (int r = 0; r < kBand; ++r) {
    const T e = ((start + static_cast<T>(r)) - g.my) * g.per_y;
    const T d = g.reach - e * e;
    const T middle = g.mx + g.stretch * (g.skew * e);
    const T half = g.stretch * std::sqrt(d > 0 ? d : T(0)) + g.margin;
    const bool reached = d >= 0 && r < count;
    rows.e[r] = e;
    rows.low[r] = reached ? middle - half : far;
    rows.high[r] = reached ? middle + half : -far;
  }
  if (g.extreme) {
    for (int r = 0; r < kBand; ++r) {
      rows.low[r] = r < count ? -far : far;
      rows.high[r] = r < count ? far : -far;
    }
  }
  extremes(rows);
}

// Bit r: row r reaches the columns [from, to].
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE uint32_t rows_reaching(const Rows<T>& rows, T from, T to) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 4) {
    const __m512 low = _mm512_load_ps(rows.low), high = _mm512_load_ps(rows.high);
    return _mm512_cmp_ps_mask(low, _mm512_set1_ps(to), _CMP_LE_OQ) &
           _mm512_cmp_ps_mask(high, _mm512_set1_ps(from), _CMP_GE_OQ);
  }
#endif
  uint32_t found = 0;
  for (int r = 0; r < kBand; ++r) {
    found |= static_cast<uint32_t>((rows.low[r] <= to) & (rows.high[r] >= from)) << r;
  }
  return found;
}

// The first column of the rows and the last, inside the image; first > last: there is none.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void columns_of(const Rows<T>& rows, int64_t width, int64_t& first,
                                              int64_t& last) {
  const T end = static_cast<T>(width - 1);
  if (!(rows.least <= end) || !(rows.most >= 0)) {
    first = 0;
    last = -1;
    return;
  }
  first = rows.least > 0 ? static_cast<int64_t>(rows.least) : 0;
  last = rows.most < end ? static_cast<int64_t>(rows.most) : width - 1;
}

// x = the columns of a block.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void columns_from(int64_t first, typename Lanes<T>::type& x) {
  for (int i = 0; i < Lanes<T>::count; ++i) x[i] = static_cast<T>(i);
  x += static_cast<T>(first);
}

}  // namespace sapwood::splat2d::SAPWOOD_ISA
