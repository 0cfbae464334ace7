// The exact kernel: per output the maximum of its own terms, then the sum of exp(term - maximum). A
// tile is kGroup rows by one strip; operands are packed to a (depth, kGroup) and b (depth, kStrip).
// Compiled once per instruction set.
namespace sapwood::logsemiring::SAPWOOD_ISA {

// a[k][r] = x(row0 + r, first + k), -inf from row `rows` on.
template <class T>
SAPWOOD_TARGET void pack_rows(const Matrix<T>& x, int64_t row0, int64_t rows, int64_t first,
                              int64_t depth, T* a) {
  for (int64_t r = 0; r < kGroup; ++r) {
    const T* from = x.data + (row0 + r) * x.row_stride + first * x.col_stride;
    for (int64_t l = 0; l < depth; ++l) {
      a[l * kGroup + r] = r < rows ? from[l * x.col_stride] : -kInf<T>;
    }
  }
}

// b[k][j] = x(first + k, col0 + j), -inf from column `cols` on.
template <class T>
SAPWOOD_TARGET void pack_cols(const Matrix<T>& x, int64_t col0, int64_t cols, int64_t first,
                              int64_t depth, T* b) {
  constexpr int64_t S = kStrip<T>;
  for (int64_t l = 0; l < depth; ++l) {
    const T* from = x.data + (first + l) * x.row_stride + col0 * x.col_stride;
    T* to = b + l * S;
    if (x.col_stride == 1) {
      std::copy_n(from, cols, to);
    } else {
      for (int64_t j = 0; j < cols; ++j) to[j] = from[j * x.col_stride];
    }
    std::fill_n(to + cols, S - cols, -kInf<T>);
  }
}

template <int R, int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void maxima_block(const T* __restrict a, const T* __restrict b,
                                                int64_t depth, T* top) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  Vec best[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(best[r][v], top + r * kStrip<T> + v * W);
  }
  for (int64_t l = 0; l < depth; ++l) {
    Vec y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(y[v], b + l * kStrip<T> + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec x = a[l * kGroup + r] + y[v];
        larger<T>(best[r][v], x, best[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<T>(top + r * kStrip<T> + v * W, best[r][v]);
  }
}

// term = a + b - top; compensated: with the rounding error of a + b (two-sum), so that the weights
// of terms of nearly equal size are right even where |a| is 1e4.
template <bool compensated, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void difference(T a, const typename Lanes<T>::type& b,
                                              const typename Lanes<T>::type& top,
                                              typename Lanes<T>::type& d) {
  using Vec = typename Lanes<T>::type;
  const Vec x = a + b;
  d = x - top;
  if constexpr (compensated) {
    const Vec part = x - a;
    const Vec error = (a - (x - part)) + (b - part);
    const Vec known = error == error ? error : Vec{};  // an infinite term has no error
    d = x == top ? known : d + known;                  // the difference of two infinities is 0 here
  }
}

template <int R, int V, bool compensated, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void sums_block(const T* __restrict a, const T* __restrict b,
                                              int64_t depth, const T* top, T* sum) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  Vec acc[R][V], most[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      load<T>(acc[r][v], sum + r * kStrip<T> + v * W);
      load<T>(most[r][v], top + r * kStrip<T> + v * W);
    }
  }
  for (int64_t l = 0; l < depth; ++l) {
    Vec y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(y[v], b + l * kStrip<T> + v * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        Vec d;
        difference<compensated, T>(a[l * kGroup + r], y[v], most[r][v], d);
        exp_nonpositive<Below::tiny, T>(d);
        acc[r][v] += d;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<T>(sum + r * kStrip<T> + v * W, acc[r][v]);
  }
}

// top = max(top, terms) for `rows` <= kGroup rows and `cols` <= kStrip columns.
template <class T>
SAPWOOD_TARGET void exact_maxima(const T* a, const T* b, int64_t depth, int64_t rows, int64_t cols,
                                 T* top) {
  constexpr int V = SAPWOOD_IS_AVX512 ? 2 : 1, W = Lanes<T>::count;
  for (int64_t w = 0; w < cols;) {
    const bool wide = V == 2 && cols - w > W;
    for (int64_t r = 0; r < rows;) {
      T* t = top + r * kStrip<T> + w;
      if (rows - r >= 4) {
        wide ? maxima_block<4, V, T>(a + r, b + w, depth, t)
             : maxima_block<4, 1, T>(a + r, b + w, depth, t);
        r += 4;
      } else {
        wide ? maxima_block<1, V, T>(a + r, b + w, depth, t)
             : maxima_block<1, 1, T>(a + r, b + w, depth, t);
        r += 1;
      }
    }
    w += wide ? V * W : W;
  }
}

// sum += exp(terms - top); the caller gives 0 for a maximum that is not finite.
template <bool compensated, class T>
SAPWOOD_TARGET void exact_sums(const T* a, const T* b, int64_t depth, int64_t rows, int64_t cols,
                               const T* top, T* sum) {
  constexpr int V = SAPWOOD_IS_AVX512 ? 2 : 1, W = Lanes<T>::count;
  for (int64_t w = 0; w < cols;) {
    const bool wide = V == 2 && cols - w > W;
    for (int64_t r = 0; r < rows;) {
      const int64_t at = r * kStrip<T> + w;
      if (rows - r >= 4) {
        wide ? sums_block<4, V, compensated, T>(a + r, b + w, depth, top + at, sum + at)
             : sums_block<4, 1, compensated, T>(a + r, b + w, depth, top + at, sum + at);
        r += 4;
      } else {
        wide ? sums_block<1, V, compensated, T>(a + r, b + w, depth, top + at, sum + at)
             : sums_block<1, 1, compensated, T>(a + r, b + w, depth, top + at, sum + at);
        r += 1;
      }
    }
    w += wide ? V * W : W;
  }
}

// A whole tile: its own maxima, what is subtracted (0 for a maximum that is not finite) and sums.
template <class T>
struct ExactTile {
  T top[kGroup * kStrip<T>], shift[kGroup * kStrip<T>], sum[kGroup * kStrip<T>];
};

// Fills the tile of rows [row0, row0 + rows) and columns [col0, col0 + cols). `pa` and `pb` hold one
// pass of packed terms; pb may be ready from a neighbour when all terms fit one pass.
template <bool compensated, class T>
SAPWOOD_TARGET void exact_tile(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row0,
                               int64_t rows, int64_t col0, int64_t cols, T* pa, T* pb,
                               bool pb_ready, ExactTile<T>& tile) {
  constexpr int64_t size = kGroup * kStrip<T>;
  std::fill_n(tile.top, size, -kInf<T>);
  std::fill_n(tile.sum, size, T(0));
  const bool one_pass = k <= kExactDepth;
  for (int64_t l = 0; l < k; l += kExactDepth) {
    const int64_t depth = std::min(kExactDepth, k - l);
    pack_rows(a, row0, rows, l, depth, pa);
    if (!pb_ready || !one_pass) pack_cols(b, col0, cols, l, depth, pb);
    exact_maxima(pa, pb, depth, rows, cols, tile.top);
  }
  for (int64_t i = 0; i < size; ++i) {
    const T t = tile.top[i];
    tile.shift[i] = t > -kInf<T> && t < kInf<T> ? t : T(0);
  }
  for (int64_t l = 0; l < k; l += kExactDepth) {
    const int64_t depth = std::min(kExactDepth, k - l);
    if (!one_pass) {
      pack_rows(a, row0, rows, l, depth, pa);
      pack_cols(b, col0, cols, l, depth, pb);
    }
    exact_sums<compensated>(pa, pb, depth, rows, cols, tile.shift, tile.sum);
  }
}

// The number of +inf terms of one output, or NaN when a term is NaN.
template <class T>
SAPWOOD_TARGET inline T count_infinite(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t i,
                                       int64_t j) {
  T count = 0;
  for (int64_t l = 0; l < k; ++l) {
    const T x = a.at(i, l) + b.at(l, j);
    if (x != x) return x;
    if (x == kInf<T>) count += 1;
  }
  return count;
}

// The log of the sums of one row: a maximum of -inf stays, NaN shows in the sum. Returns whether
// some maximum is +inf; those entries need another look (exact_infinite).
template <class T>
SAPWOOD_TARGET bool exact_finish(const T* top, const T* sum, int64_t count, T* c) {
  constexpr int W = Lanes<T>::count;
  typename Lanes<T>::bits_type infinite{};
  for (int64_t j = 0; j < count; j += W) {
    typename Lanes<T>::type t, s;
    load<T>(t, top + j);
    load<T>(s, sum + j);
    s = (t == -kInf<T>)&(s == s) ? typename Lanes<T>::type{} + T(1) : s;
    log_positive<T>(s);
    infinite |= t == kInf<T>;
    t += s;
    store_some<T>(c + j, t, count - j);
  }
  return any<T>(infinite);
}

// One group of rows of c, exact.
template <class T>
SAPWOOD_TARGET void exact_forward(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row0,
                                  int64_t rows, int64_t col0, int64_t cols, T* pa, T* pb,
                                  bool pb_ready, T* c, int64_t pitch) {
  ExactTile<T> tile;
  exact_tile<false>(a, b, k, row0, rows, col0, cols, pa, pb, pb_ready, tile);
  for (int64_t r = 0; r < rows; ++r) {
    const T* top = tile.top + r * kStrip<T>;
    T* row = c + r * pitch;
    if (!exact_finish(top, tile.sum + r * kStrip<T>, cols, row)) continue;
    for (int64_t j = 0; j < cols; ++j) {
      if (top[j] == kInf<T>) {
        const T count = count_infinite(a, b, k, row0 + r, col0 + j);
        row[j] = count == count ? kInf<T> : count;
      }
    }
  }
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
