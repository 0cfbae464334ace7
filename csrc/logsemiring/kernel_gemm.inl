// The product of two packed operands, and what is made of it. Compiled once per instruction set.
namespace sapwood::logsemiring::SAPWOOD_ISA {

// shift[i] = max_k x[i, k], ignoring NaN; rows [0, m) of any strides.
template <class T>
SAPWOOD_TARGET void row_maxima(const Matrix<T>& x, int64_t m, int64_t k, T* top) {
  constexpr int W = Lanes<T>::count;
  if (x.col_stride == 1) {
    for (int64_t i = 0; i < m; ++i) {
      const T* row = x.data + i * x.row_stride;
      typename Lanes<T>::type best = typename Lanes<T>::type{} - kInf<T>, v;
      int64_t l = 0;
      for (; l + W <= k; l += W) {
        load<T>(v, row + l);
        larger<T>(best, v, best);
      }
      T lanes[W], most = -kInf<T>;
      store<T>(lanes, best);
      for (int w = 0; w < W; ++w) most = lanes[w] > most ? lanes[w] : most;
      const T* tail = row + l;
      const int64_t rest = (k - l) % W;
      for (int64_t i = 0; i < rest; ++i) most = tail[i] > most ? tail[i] : most;
      top[i] = most;
    }
    return;
  }
  std::fill_n(top, m, -kInf<T>);
  for (int64_t l = 0; l < k; ++l) {
    const T* column = x.data + l * x.col_stride;
    if (x.row_stride == 1) {
      for (int64_t i = 0; i < m; ++i) top[i] = column[i] > top[i] ? column[i] : top[i];
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const T v = column[i * x.row_stride];
        top[i] = v > top[i] ? v : top[i];
      }
    }
  }
}

// e^(x - shift) of one vector whose lanes are consecutive lanes of the operand (across) or
// consecutive terms of one lane.
template <Below below, bool exponential, bool across, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void shifted_exp(const Operand<T>& x, int64_t lane, int64_t term,
                                               typename Lanes<T>::type& v) {
  if constexpr (exponential) {
    const bool by_lane = x.lane_shift != nullptr;
    const T* shift = by_lane ? x.lane_shift + lane : x.depth_shift + term;
    typename Lanes<T>::type s = typename Lanes<T>::type{} + shift[0];
    if (by_lane == across) load<T>(s, shift);
    v -= s;
    exp_nonpositive<below, T>(v);
  }
}

// Panel of lanes that lie side by side in memory.
template <Below below, bool exponential, int64_t P, class T>
SAPWOOD_TARGET void pack_across(const Operand<T>& x, int64_t lane0, int64_t lanes, int64_t depth,
                                T* out) {
  constexpr int W = Lanes<T>::count;
  const T* from = x.data + lane0;
  typename Lanes<T>::type v;
  for (int64_t l = 0; l < depth; ++l) {
    T row[P + W];
    for (int64_t p = 0; p < P; p += W) {
      if (lanes - p >= W) {
        load<T>(v, from + l * x.depth_stride + p);
        shifted_exp<below, exponential, true>(x, lane0 + p, l, v);
        store<T>(row + p, v);
      } else {
        T some[W] = {};
        if (lanes > p) std::copy_n(from + l * x.depth_stride + p, lanes - p, some);
        load<T>(v, some);
        if (lanes > p) shifted_exp<below, exponential, true>(x, lane0 + p, l, v);
        store<T>(row + p, v);
        std::fill(row + std::max<int64_t>(lanes, p), row + p + W, T(0));
      }
    }
    __builtin_memcpy(out + l * P, row, P * sizeof(T));
  }
}

// Panel of lanes that lie apart: squares of W terms of W lanes are transposed in registers.
template <Below below, bool exponential, int64_t P, class T>
SAPWOOD_TARGET void pack_down(const Operand<T>& x, int64_t lane0, int64_t lanes, int64_t depth,
                              T* out) {
  constexpr int W = Lanes<T>::count;
  for (int64_t first = 0; first < depth; first += W) {
    const int64_t terms = std::min<int64_t>(W, depth - first);
    for (int64_t p = 0; p < P; p += W) {
      typename Lanes<T>::type square[W];
      for (int i = 0; i < W; ++i) {
        square[i] = typename Lanes<T>::type{};
        if (p + i >= lanes) continue;
        const T* lane = x.data + (lane0 + p + i) * x.lane_stride + first * x.depth_stride;
        if (terms == W && x.depth_stride == 1) {
          load<T>(square[i], lane);
        } else {
          T some[W] = {};
          for (int64_t l = 0; l < terms; ++l) some[l] = lane[l * x.depth_stride];
          load<T>(square[i], some);
        }
        shifted_exp<below, exponential, false>(x, lane0 + p + i, first, square[i]);
      }
      transpose<W / 2, T>(square);
      const int64_t width = std::min<int64_t>(W, P - p);
      for (int64_t l = 0; l < terms; ++l) {
        T* to = out + (first + l) * P + p;
        if (width == W || (P < W && l + 1 < terms)) {
          store<T>(to, square[l]);  // what runs over is written again by the next term
        } else {
          store_some<T>(to, square[l], width);
        }
      }
    }
  }
}

// out[k][P] for `lanes` <= P lanes and terms [0, depth); lanes that do not exist become 0. Shifts are
// readable up to whole vectors.
template <Below below, bool exponential, int64_t P, class T>
SAPWOOD_TARGET void pack_panel(const Operand<T>& x, int64_t lane0, int64_t lanes, int64_t depth,
                               T* out) {
  if (x.lane_stride == 1) return pack_across<below, exponential, P>(x, lane0, lanes, depth, out);
  pack_down<below, exponential, P>(x, lane0, lanes, depth, out);
}

// Packs a panel; `keep_nan` decides whether NaN stays (forward: it refuses the certificate) or
// becomes 0 (backward: the exact kernel deals with it).
template <int64_t P, class T>
SAPWOOD_TARGET void pack(const Operand<T>& x, bool keep_nan, int64_t lane0, int64_t lanes,
                         int64_t depth, T* out) {
  const bool exponential = x.lane_shift != nullptr || x.depth_shift != nullptr;
  if (!exponential) return pack_panel<Below::zero, false, P>(x, lane0, lanes, depth, out);
  if (keep_nan) return pack_panel<Below::zero, true, P>(x, lane0, lanes, depth, out);
  return pack_panel<Below::zero_and_nan, true, P>(x, lane0, lanes, depth, out);
}

template <class T>
SAPWOOD_TARGET void pack_left(const Operand<T>& x, bool keep_nan, int64_t lane0, int64_t lanes,
                              int64_t depth, T* out) {
  pack<kRows>(x, keep_nan, lane0, lanes, depth, out);
}

template <class T>
SAPWOOD_TARGET void pack_right(const Operand<T>& x, bool keep_nan, int64_t lane0, int64_t lanes,
                               int64_t depth, T* out) {
  pack<kStrip<T>>(x, keep_nan, lane0, lanes, depth, out);
}

// sums (kRows, V vectors) += left (depth, kRows)^T right (depth, kStrip) for one slice of columns.
template <int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void register_tile(const T* __restrict left,
                                                 const T* __restrict right, int64_t depth, T* sums,
                                                 int64_t pitch) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  Vec acc[kRows][V];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(acc[i][v], sums + i * pitch + v * W);
  }
  for (int64_t l = 0; l < depth; ++l) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(b[v], right + l * kStrip<T> + v * W);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] += left[l * kRows + i] * b[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<T>(sums + i * pitch + v * W, acc[i][v]);
  }
}

// sums (kTileRows, kTileCols) = left right for `panels` of kRows and `strips` of kStrip; packed
// panels are `left_depth` = `right_depth` = depth terms long.
template <class T>
SAPWOOD_TARGET void tile_product(const T* left, const T* right, int64_t depth, int64_t panels,
                                 int64_t strips, T* sums) {
  constexpr int V = SAPWOOD_IS_AVX512 ? 2 : 1;
  constexpr int64_t S = kStrip<T>, C = kTileCols<T>;
  for (int64_t i = 0; i < panels * kRows; ++i) std::fill_n(sums + i * C, strips * S, T(0));
  const int64_t passes = (depth + kDepth - 1) / kDepth;
  const int64_t step = passes > 0 ? (depth + passes - 1) / passes : 0;
  for (int64_t l = 0; l < depth; l += step) {
    const int64_t terms = std::min(step, depth - l);
    for (int64_t s = 0; s < strips; ++s) {  // a strip stays in L1 for all panels
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t w = 0; w < S; w += V * Lanes<T>::count) {
          register_tile<V, T>(left + p * depth * kRows + l * kRows,
                              right + s * depth * S + l * S + w, terms,
                              sums + p * kRows * C + s * S + w, C);
        }
      }
    }
  }
}

// What became of some entries of S: certified, or zero because a whole row or column is, or neither.
template <class T>
struct Verdict {
  typename Lanes<T>::bits_type certified, zero, open;

  SAPWOOD_TARGET SAPWOOD_INLINE Verdict(const typename Lanes<T>::type& s, T alpha,
                                        const typename Lanes<T>::type& beta, T least,
                                        int64_t count) {
    certified = (s >= least) & (s < kInf<T>);
    zero = (s == T(0)) & ((beta == -kInf<T>) | (alpha == -kInf<T> ? -1 : 0));
    open = ~(certified | zero);
    if (count < Lanes<T>::count) {  // lanes that do not exist are not open
      for (int i = 0; i < Lanes<T>::count; ++i) open[i] = i < count ? open[i] : 0;
    }
  }
};

// c = alpha + beta + log S where certified, -inf where a whole row or column is zero. Returns false
// when an entry is neither. beta is readable up to a full strip.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE bool finish_row(const T* s, T alpha, const T* beta, T least,
                                              int64_t count, T* c) {
  constexpr int W = Lanes<T>::count;
  typename Lanes<T>::bits_type open{};
  for (int64_t j = 0; j < count; j += W) {
    typename Lanes<T>::type v, shift;
    load<T>(v, s + j);
    load<T>(shift, beta + j);
    const Verdict<T> is(v, alpha, shift, least, count - j);
    open |= is.open;
    log_positive<T>(v);
    v += alpha + shift;
    v = is.zero ? typename Lanes<T>::type{} - kInf<T> : v;
    store_some<T>(c + j, v, count - j);
  }
  return !any<T>(open);
}

// w = grad / S, 0 where a whole row or column is zero.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE bool weigh_row(const T* s, T alpha, const T* beta, T least,
                                             int64_t count, const T* grad, int64_t grad_stride,
                                             T scale, T* w) {
  constexpr int W = Lanes<T>::count;
  typename Lanes<T>::bits_type open{};
  for (int64_t j = 0; j < count; j += W) {
    typename Lanes<T>::type v, shift, g;
    load<T>(v, s + j);
    load<T>(shift, beta + j);
    if (grad_stride == 0) {  // as the gradient of a sum is
      g = typename Lanes<T>::type{} + grad[0];
    } else if (grad_stride == 1 && count - j >= W) {
      load<T>(g, grad + j);
    } else {
      T lanes[W] = {};
      for (int64_t i = 0; i < std::min<int64_t>(W, count - j); ++i) {
        lanes[i] = grad[(j + i) * grad_stride];
      }
      load<T>(g, lanes);
    }
    const Verdict<T> is(v, alpha, shift, least, count - j);
    open |= is.open;
    v = is.certified ? g * scale / v : typename Lanes<T>::type{};
    store_some<T>(w + j, v, count - j);
  }
  return !any<T>(open);
}

// A strip of a finished tile: out (rows, count) of pitch `pitch`. open[group] is set where a group
// of kGroup rows has an entry without a certificate; such a group is written again later.
template <class T>
SAPWOOD_TARGET void finish_strip(const T* sums, const T* alpha, const T* beta, T least,
                                 int64_t rows, int64_t count, T* out, int64_t pitch,
                                 uint8_t* open) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool done =
        finish_row<T>(sums + i * kTileCols<T>, alpha[i], beta, least, count, out + i * pitch);
    if (!done) open[i / kGroup] = 1;
  }
}

template <class T>
SAPWOOD_TARGET void weigh_strip(const T* sums, const T* alpha, const T* beta, T least, int64_t rows,
                                int64_t count, const Matrix<T>& grad, T scale, T* out,
                                int64_t pitch, uint8_t* open) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool done =
        weigh_row<T>(sums + i * kTileCols<T>, alpha[i], beta, least, count,
                     grad.data + i * grad.row_stride, grad.col_stride, scale, out + i * pitch);
    if (!done) open[i / kGroup] = 1;
  }
  for (int64_t i = 0; i < rows; ++i) {  // an open group belongs to the exact kernel altogether
    if (open[i / kGroup] != 0) std::fill_n(out + i * pitch, count, T(0));
  }
}

// The largest finite |x|.
template <class T>
SAPWOOD_TARGET void largest_finite(const Matrix<T>& x, int64_t m, int64_t n, T* most) {
  constexpr int W = Lanes<T>::count;
  typename Lanes<T>::type best{}, v;
  if (x.row_stride == 0) m = std::min<int64_t>(m, 1);
  if (x.col_stride == 0) n = std::min<int64_t>(n, 1);
  for (int64_t i = 0; i < m; ++i) {
    const T* row = x.data + i * x.row_stride;
    int64_t j = 0;
    for (; x.col_stride == 1 && j + W <= n; j += W) {
      load<T>(v, row + j);
      v = v < T(0) ? -v : v;
      v = v < kInf<T> ? v : typename Lanes<T>::type{};
      larger<T>(best, v, best);
    }
    for (; j < n; ++j) {
      const T one = std::abs(row[j * x.col_stride]);
      *most = one > *most && one < kInf<T> ? one : *most;
    }
  }
  T lanes[W];
  store<T>(lanes, best);
  for (int i = 0; i < W; ++i) *most = std::max(*most, lanes[i]);
}

// out = exp(x - shift) sums: the shift is that of row i, or that of column j.
template <class T>
SAPWOOD_TARGET void scale_tile(const T* sums, const Matrix<T>& x, const T* row_shift,
                               const T* col_shift, T scale, int64_t rows, int64_t cols, T* out,
                               int64_t pitch) {
  T e[kTileCols<T> + Lanes<T>::count];
  for (int64_t i = 0; i < rows; ++i) {
    if (x.col_stride == 1) {
      std::copy_n(&x.at(i, 0), cols, e);
    } else {
      for (int64_t j = 0; j < cols; ++j) e[j] = x.at(i, j);
    }
    if (row_shift != nullptr) {
      exp_row<Below::zero_and_nan, false, T>(e, row_shift + i, cols);
    } else {
      exp_row<Below::zero_and_nan, true, T>(e, col_shift, cols);
    }
    const T* s = sums + i * kTileCols<T>;
    T* to = out + i * pitch;
    for (int64_t j = 0; j < cols; ++j) to[j] = e[j] == T(0) ? T(0) : e[j] * s[j] * scale;
  }
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
