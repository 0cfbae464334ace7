// The max-plus product: values and the lowest index that attains them. Compiled once per instruction
// set; operands are packed as for the exact kernel.
namespace sapwood::logsemiring::SAPWOOD_ISA {

// Index vectors are as wide as values: a pass is short enough for them.
template <int R, int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void arg_block(const T* __restrict a, const T* __restrict b,
                                             int64_t depth, int64_t first, T* top, int64_t* index) {
  using Vec = typename Lanes<T>::type;
  using Bits = typename Lanes<T>::bits_type;
  constexpr int W = Lanes<T>::count;
  Vec best[R][V];
  Bits at[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      load<T>(best[r][v], top + r * kStrip<T> + v * W);
      at[r][v] = Bits{} - 1;
    }
  }
  for (int64_t l = 0; l < depth; ++l) {
    const Bits here = Bits{} + static_cast<typename Lanes<T>::bits>(l);
    Vec y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(y[v], b + l * kStrip<T> + v * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec x = a[l * kGroup + r] + y[v];
        at[r][v] = x > best[r][v] ? here : at[r][v];
        larger<T>(best[r][v], x, best[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store<T>(top + r * kStrip<T> + v * W, best[r][v]);
      for (int i = 0; i < W; ++i) {
        int64_t& to = index[r * kStrip<T> + v * W + i];
        to = at[r][v][i] >= 0 ? first + at[r][v][i] : to;
      }
    }
  }
}

// top = max(top, terms) and index = where, for a pass of terms that begins at `first`. NaN is ignored.
template <class T>
SAPWOOD_TARGET void arg_maxima(const T* a, const T* b, int64_t depth, int64_t first, int64_t rows,
                               int64_t cols, T* top, int64_t* index) {
  constexpr int V = SAPWOOD_IS_AVX512 ? 2 : 1, W = Lanes<T>::count;
  for (int64_t w = 0; w < cols;) {
    const bool wide = V == 2 && cols - w > W;
    for (int64_t r = 0; r < rows;) {
      const int64_t to = r * kStrip<T> + w;
      if (rows - r >= 4) {
        wide ? arg_block<4, V, T>(a + r, b + w, depth, first, top + to, index + to)
             : arg_block<4, 1, T>(a + r, b + w, depth, first, top + to, index + to);
        r += 4;
      } else {
        wide ? arg_block<1, V, T>(a + r, b + w, depth, first, top + to, index + to)
             : arg_block<1, 1, T>(a + r, b + w, depth, first, top + to, index + to);
        r += 1;
      }
    }
    w += wide ? V * W : W;
  }
}

// Terms of one segment side by side, writable for a vector beyond their end: the maximum, and where
// it is finite terms become exp(term - maximum) and are summed.
template <class T>
SAPWOOD_TARGET void reduce_terms(T* terms, int64_t count, T* top, T* sum) {
  using V = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  V v = V{} - kInf<T>, best = v, total{};
  store<T>(terms + count, v);
  for (int64_t i = 0; i < count; i += W) {
    load<T>(v, terms + i);
    larger<T>(best, v, best);
  }
  *top = max_lanes<T>(best);
  if (!(*top > -kInf<T> && *top < kInf<T>)) return;
  const V shift = V{} + *top;
  for (int64_t i = 0; i < count; i += W) {
    load<T>(v, terms + i);
    v -= shift;
    exp_nonpositive<Below::zero, T>(v);
    store<T>(terms + i, v);
    total += v;
  }
  *sum = sum_lanes<T>(total);
}

// Draws for one row of a and columns [0, n) of b: argmax_k a + b + gumbel, -1 where no term has mass;
// NaN terms take no part. The noise is that of philox.h, on vectors.
template <class T>
SAPWOOD_TARGET void draw_row(const Matrix<T>& a, const Matrix<T>& b, int64_t i, int64_t n,
                             int64_t k, uint64_t key, uint32_t batch, int64_t* out) {
  using V = Lanes<double>::type;
  using I = Lanes<double>::bits_type;
  typedef uint64_t U __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  constexpr int W = Lanes<double>::count;
  const U low = U{} + 0xFFFFFFFFu;
  for (int64_t j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    U column;
    for (int w = 0; w < W; ++w) column[w] = static_cast<uint64_t>(j + w);
    V best = V{} - kInf<double>;
    I found = I{} - 1;
    for (int64_t l = 0; l < k; ++l) {
      double terms[W];
      const double left = static_cast<double>(a.at(i, l));
      for (int64_t w = 0; w < W; ++w) {
        terms[w] = left + static_cast<double>(b.at(l, j + std::min(w, count - 1)));
      }
      V x;
      load<double>(x, terms);
      U c0 = U{} + static_cast<uint32_t>(l), c1 = column;
      U c2 = U{} + static_cast<uint32_t>(i), c3 = U{} + batch;
      uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const U p0 = c0 * 0xD2511F53u, p1 = c2 * 0xCD9E8D57u;
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c1 = p1 & low;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c3 = p0 & low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      // 1 - uniform is exact in double
      V noise = 1.0 - (__builtin_convertvector((I)c0, V) + 0.5) * 0x1p-32;
      log_positive<double>(noise);
      noise = -noise;
      log_positive<double>(noise);
      const V y = x - noise;
      const I better = (x > -kInf<double>)&(y > best);
      best = better ? y : best;
      found = better ? I{} + l : found;
    }
    for (int64_t w = 0; w < count; ++w) out[j + w] = found[w];
  }
}

// Whether any entry is NaN or +inf: only then a sum may be NaN.
template <class T>
SAPWOOD_TARGET void may_be_nan(const Matrix<T>& x, int64_t m, int64_t n, bool* found) {
  const bool turned = x.row_stride == 1;
  const Matrix<T> y = turned ? x.transposed() : x;
  const int64_t rows = turned ? n : m, cols = turned ? m : n;
  typename Lanes<T>::bits some = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = y.data + i * y.row_stride;
    if (y.col_stride == 1) {
      for (int64_t j = 0; j < cols; ++j) some |= row[j] < kInf<T> ? 0 : 1;
    } else {
      for (int64_t j = 0; j < cols; ++j) some |= row[j * y.col_stride] < kInf<T> ? 0 : 1;
    }
  }
  *found = some != 0;
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
