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

// Terms of one segment side by side, readable and writable up to whole vectors: the maximum, and where
// it is finite terms become exp(term - maximum) and are summed.
template <class T>
SAPWOOD_TARGET void reduce_terms(T* terms, int64_t count, T* top, T* sum) {
  constexpr int W = Lanes<T>::count;
  std::fill_n(terms + count, round_up(count, W) - count, -kInf<T>);
  row_maxima(Matrix<T>{terms, 0, 1}, 1, count, top);
  if (!(*top > -kInf<T> && *top < kInf<T>)) return;
  exp_row<Below::zero, false, T>(terms, top, count);
  typename Lanes<T>::type total{}, v;
  for (int64_t i = 0; i < count; i += W) {
    load<T>(v, terms + i);
    total += v;
  }
  *sum = sum_lanes<T>(total);
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
