// Vectors, and the exponential of a number that is not positive. Compiled once per instruction set.
namespace sapwood::logsemiring::SAPWOOD_ISA {

template <class T>
struct Lanes {
  static constexpr int count = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  using bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef bits bits_type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
};

template <class T>
struct Exp2;

// Below `lowest` e^x is not a normal number; `magic` rounds to an integer and leaves it, plus the
// exponent's bias, in the low bits. The polynomial is 2^f for |f| <= 1/2.
template <>
struct Exp2<float> {
  static constexpr float lowest = -87.0f, log2e = 0x1.715476p+0f, log2e_low = 0x1.4ae0cp-26f;
  static constexpr float magic = 0x1.8p+23f + 127.0f;
  static constexpr int mantissa = 23, degree = 6;
  static constexpr float c[] = {1.0f,           0x1.62e43p-1f,  0x1.ebfbep-3f, 0x1.c6aeccp-5f,
                                0x1.3b2a1cp-7f, 0x1.5f48cp-10f, 0x1.444p-13f};
};
template <>
struct Exp2<double> {
  static constexpr double lowest = -708.0, log2e = 0x1.71547652b82fep+0;
  static constexpr double log2e_low = 0x1.777d0ffda0d24p-56;
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

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void load(typename Lanes<T>::type& v, const T* from) {
  __builtin_memcpy(&v, from, sizeof v);
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void store(T* to, const typename Lanes<T>::type& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// v = a > b ? a : b, which is b where one is NaN: gcc takes a comparison and a blend for that.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void larger(typename Lanes<T>::type& v,
                                          const typename Lanes<T>::type& a,
                                          const typename Lanes<T>::type& b) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 8) {
    v = (typename Lanes<T>::type)_mm512_max_pd((__m512d)a, (__m512d)b);
  } else {
    v = (typename Lanes<T>::type)_mm512_max_ps((__m512)a, (__m512)b);
  }
#else
  v = a > b ? a : b;
#endif
}

// Bit i says that lane i of both is equal.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE unsigned equal_lanes(const typename Lanes<T>::type& a,
                                                   const typename Lanes<T>::type& b) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 8)
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
  else
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#else
  const typename Lanes<T>::bits_type equal = a == b;
  unsigned found = 0;
  for (int i = 0; i < Lanes<T>::count; ++i) found |= static_cast<unsigned>(equal[i] & 1) << i;
  return found;
#endif
}

// The sum of all lanes, in an order that the vector length decides.
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

// The largest lane of a vector without NaN.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE T max_lanes(const typename Lanes<T>::type& v) {
#if SAPWOOD_IS_AVX512
  if constexpr (sizeof(T) == 8)
    return _mm512_reduce_max_pd((__m512d)v);
  else
    return _mm512_reduce_max_ps((__m512)v);
#else
  T lanes[Lanes<T>::count];
  store<T>(lanes, v);
  for (int h = Lanes<T>::count / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lanes[i] = lanes[i + h] > lanes[i] ? lanes[i + h] : lanes[i];
  }
  return lanes[0];
#endif
}

// What an argument below Exp2::lowest becomes: any number below 2^-124 (cheapest, for a sum that
// is at least 1), exactly zero, or exactly zero for NaN as well.
enum class Below { tiny, zero, zero_and_nan };

// v = e^v within 2 ulp for v <= 0; NaN is kept unless said otherwise.
template <Below below, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void exp_nonpositive(typename Lanes<T>::type& v) {
  using V = typename Lanes<T>::type;
  using I = typename Lanes<T>::bits_type;
  using E = Exp2<T>;
  const V lowest = V{} + E::lowest;
  V d;
  larger<T>(d, lowest, v);
  const V shifted = d * E::log2e + E::magic;
  const V n = shifted - E::magic;
  V f = d * E::log2e - n;
  if constexpr (below != Below::tiny) f = d * E::log2e_low + f;
  V p = V{} + E::c[E::degree];
#pragma GCC unroll 16
  for (int i = E::degree - 1; i >= 0; --i) p = p * f + E::c[i];
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= E::mantissa;
  V scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  p *= scale;
  if constexpr (below == Below::zero) p = v < lowest ? V{} : p;
  if constexpr (below == Below::zero_and_nan) p = v >= lowest ? p : V{};
  v = p;
}

// x[i] = exp(x[i] - shift[i or 0]) in place; both are readable, and x writable, up to whole vectors.
template <Below below, bool per_element, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void exp_row(T* x, const T* shift, int64_t count) {
  typename Lanes<T>::type v, s = typename Lanes<T>::type{} + shift[0];
  for (int64_t i = 0; i < count; i += Lanes<T>::count) {
    load<T>(v, x + i);
    if constexpr (per_element) load<T>(s, shift + i);
    v -= s;
    exp_nonpositive<below, T>(v);
    store<T>(x + i, v);
  }
}

// Exchanges the blocks of H lanes that lie across the diagonal of two rows of a square.
template <int H, class T, int... L>
SAPWOOD_TARGET SAPWOOD_INLINE void exchange(typename Lanes<T>::type& a, typename Lanes<T>::type& b,
                                            std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::count;
  using I = typename Lanes<T>::bits_type;
  const typename Lanes<T>::type first = __builtin_shuffle(a, b, I{((L & H) ? W + L - H : L)...});
  b = __builtin_shuffle(a, b, I{((L & H) ? W + L : L + H)...});
  a = first;
}

// Transposes a square of vectors.
template <int H, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void transpose(typename Lanes<T>::type* square) {
  constexpr int W = Lanes<T>::count;
  if constexpr (H >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & H) == 0) {
        exchange<H, T>(square[i], square[i + H], std::make_integer_sequence<int, W>{});
      }
    }
    transpose<H / 2, T>(square);
  }
}

// v = ln v within 2 ulp for normal v > 0; NaN is kept. In double by ln m = 2 artanh((m - 1)/(m + 1)).
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void log_positive(typename Lanes<T>::type& v) {
  using V = typename Lanes<T>::type;
  if constexpr (sizeof(T) == 8) {
    using I = typename Lanes<T>::bits_type;
    I bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    const I exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;  // mantissa in [sqrt(1/2), sqrt(2))
    bits -= exponent << 52;
    V f;
    __builtin_memcpy(&f, &bits, sizeof f);
    f -= 1.0;
    const V n = __builtin_convertvector(exponent, V);
    const V s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
    V p = V{} + 2.0 / 19;  // 2/3 + 2/5 z + 2/7 z^2 + ..., z < 0.0295
#pragma GCC unroll 8
    for (int i = 17; i >= 3; i -= 2) p = p * z + 2.0 / i;
    const V y =
        n * 0x1.62e42feep-1 - ((half - (s * (half + p * z) + n * 0x1.a39ef35793c76p-33)) - f);
    v = v == v ? y : v;
  } else {
    using I = typename Lanes<T>::bits_type;
    constexpr float c[] = {-0x1.000006p-2f, 0x1.99a4b6p-3f, -0x1.555c4ep-3f, 0x1.233766p-3f,
                           -0x1.fc220ep-4f, 0x1.e6f08cp-4f, -0x1.de3bf8p-4f, 0x1.14573ep-4f};
    I bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    const I exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    bits -= exponent << 23;
    V f;
    __builtin_memcpy(&f, &bits, sizeof f);
    f -= 1.0f;
    const V n = __builtin_convertvector(exponent, V);
    V p = V{} + c[7];
#pragma GCC unroll 8
    for (int i = 6; i >= 0; --i) p = p * f + c[i];
    p = p * f + 0x1.555548p-2f;
    V y = (p * f) * (f * f) + n * 0x1.7f7d1cp-20f;
    y = (y - 0.5f * f * f) + f + n * 0x1.62e4p-1f;
    v = v == v ? y : v;
  }
}

// Whether any lane of a comparison holds.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE bool any(const typename Lanes<T>::bits_type& mask) {
  typename Lanes<T>::bits found = 0;
  for (int i = 0; i < Lanes<T>::count; ++i) found |= mask[i];
  return found != 0;
}

// Stores the first `count` lanes.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void store_some(T* to, const typename Lanes<T>::type& v,
                                              int64_t count) {
  if (count >= Lanes<T>::count) return store<T>(to, v);
  T lanes[Lanes<T>::count];
  store<T>(lanes, v);
  std::copy_n(lanes, count, to);
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
