// The max-plus product: values and the lowest index that attains them. Compiled once per instruction
// set. Columns of b are packed as for the exact kernel, and turned; of a, rows are copied. First the
// maximum of each output and the block of terms it lies in; then where in that block.
namespace sapwood::logsemiring::SAPWOOD_ISA {

// One block of kBlock terms for R rows: top = max(top, terms), and block = `here` where that is new.
template <int R, int V, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void block_maxima(const T* __restrict a, int64_t pitch,
                                                const T* __restrict b, int64_t here, T* top,
                                                typename Lanes<T>::bits* block) {
  using Vec = typename Lanes<T>::type;
  using Bits = typename Lanes<T>::bits_type;
  constexpr int W = Lanes<T>::count;
  Vec best[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) best[r][v] = Vec{} - kInf<T>;
  }
#pragma GCC unroll 4
  for (int64_t l = 0; l < kBlock; ++l) {
    Vec y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) load<T>(y[v], b + l * kStrip<T> + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec x = a[r * pitch + l] + y[v];
        larger<T>(best[r][v], x, best[r][v]);
      }
    }
  }
  const Bits now = Bits{} + static_cast<typename Lanes<T>::bits>(here);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t to = r * kStrip<T> + v * W;
      Vec before;
      Bits at;
      load<T>(before, top + to);
      __builtin_memcpy(&at, block + to, sizeof at);
      at = best[r][v] > before ? now : at;
      larger<T>(before, best[r][v], before);
      store<T>(top + to, before);
      __builtin_memcpy(block + to, &at, sizeof at);
    }
  }
}

// top = max(top, terms) and block = the first block of kBlock terms that attains it. NaN is ignored.
// a (kGroup, depth) of the given pitch, b (depth, kStrip), depth in whole blocks.
template <class T>
SAPWOOD_TARGET void arg_maxima(const T* a, int64_t pitch, const T* b, int64_t depth, int64_t rows,
                               int64_t cols, T* top, typename Lanes<T>::bits* block) {
  constexpr int V = SAPWOOD_IS_AVX512 ? 2 : 1, W = Lanes<T>::count;
  for (int64_t w = 0; w < cols; w += V * W) {
    for (int64_t l = 0; l < depth; l += kBlock) {
      const T* y = b + l * kStrip<T> + w;
      if (rows > 4) {
        block_maxima<8, V, T>(a + l, pitch, y, l / kBlock, top + w, block + w);
      } else if (rows > 1) {
        block_maxima<4, V, T>(a + l, pitch, y, l / kBlock, top + w, block + w);
      } else {
        block_maxima<1, V, T>(a + l, pitch, y, l / kBlock, top + w, block + w);
      }
    }
  }
}

// to[r * pitch + l] = x(row0 + r, first + l), -inf from row `rows` and from term `depth` to `whole` on.
template <class T>
SAPWOOD_TARGET void copy_rows(const Matrix<T>& x, int64_t row0, int64_t rows, int64_t first,
                              int64_t depth, int64_t whole, int64_t pitch, T* to) {
  for (int64_t r = 0; r < kGroup; ++r) {
    const int64_t count = r < rows ? depth : 0;
    const T* from = x.data + (row0 + r) * x.row_stride + first * x.col_stride;
    if (x.col_stride == 1) {
      std::copy_n(from, count, to + r * pitch);
    } else {
      for (int64_t l = 0; l < count; ++l) to[r * pitch + l] = from[l * x.col_stride];
    }
    std::fill(to + r * pitch + count, to + r * pitch + whole, -kInf<T>);
  }
}

// to[j * pitch + l] = from[l * lanes + j]: a panel turned, so that the terms of a lane lie together.
template <class T>
SAPWOOD_TARGET void turn_panel(const T* from, int64_t lanes, int64_t depth, int64_t pitch, T* to) {
  constexpr int W = Lanes<T>::count;
  int64_t l = 0;
  for (; lanes % W == 0 && l + W <= depth; l += W) {
    for (int64_t j = 0; j < lanes; j += W) {
      typename Lanes<T>::type square[W];
      for (int i = 0; i < W; ++i) load<T>(square[i], from + (l + i) * lanes + j);
      transpose<W / 2, T>(square);
      for (int i = 0; i < W; ++i) store<T>(to + (j + i) * pitch + l, square[i]);
    }
  }
  for (; l < depth; ++l) {
    for (int64_t j = 0; j < lanes; ++j) to[j * pitch + l] = from[l * lanes + j];
  }
}

// index = first + where in its block each maximum lies, for outputs whose block is not -1. In a and in
// the turned b the terms of a lane lie together.
template <class T>
SAPWOOD_TARGET void locate(const T* a, const T* b, int64_t pitch, int64_t first, int64_t rows,
                           int64_t cols, const T* top, const typename Lanes<T>::bits* block,
                           int64_t* index) {
  constexpr int W = Lanes<T>::count;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t out = r * kStrip<T> + j;
      if (block[out] < 0) continue;
      const int64_t begin = int64_t{block[out]} * kBlock;
      const T *x = a + r * pitch + begin, *y = b + j * pitch + begin;
      unsigned hits = 0;
      for (int64_t l = kBlock - W; l >= 0; l -= W) {
        typename Lanes<T>::type left, right;
        load<T>(left, x + l);
        load<T>(right, y + l);
        hits = hits << W | equal_lanes<T>(left + right, typename Lanes<T>::type{} + top[out]);
      }
      index[out] = first + begin + __builtin_ctz(hits);
    }
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
