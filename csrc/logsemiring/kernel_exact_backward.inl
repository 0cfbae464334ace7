// Derivatives by the exact kernel. With p = exp(a + b - shift) and the weight w = grad / sum,
//   first order    da[i,k] = sum_j w p            db[k,j] = sum_i w p
//   second order   the same with w (h[i,k] + g[k,j] - q[i,j]) in place of w, where h and g are the
//                  tangents of da and db, and q[i,j] = sum_k p (h + g) / sum
// Compiled once per instruction set.
namespace sapwood::logsemiring::SAPWOOD_ISA {

template <bool second, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void term(const Packed<T>& x, const Weights<T>& out, int64_t l,
                                        int64_t r, int64_t w, typename Lanes<T>::type& p) {
  using Vec = typename Lanes<T>::type;
  Vec y, shift, weight;
  load<T>(y, x.b + l * kStrip<T> + w);
  load<T>(shift, out.shift + r * kStrip<T> + w);
  load<T>(weight, out.weight + r * kStrip<T> + w);
  difference<true, T>(x.a[l * kGroup + r], y, shift, p);
  exp_nonpositive<Below::zero, T>(p);
  p *= weight;
  if constexpr (second) {
    Vec g, mean;
    load<T>(g, x.g + l * kStrip<T> + w);
    load<T>(mean, out.mean + r * kStrip<T> + w);
    p *= x.h[l * kGroup + r] + g - mean;
  }
}

// da[r * pitch + k] += sum over the strip.
template <bool second, class T>
SAPWOOD_TARGET void exact_grad_rows(const Packed<T>& x, const Weights<T>& out, int64_t depth,
                                    int64_t rows, int64_t cols, T* da, int64_t pitch) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < depth; ++l) {
      Vec total{}, p;
      for (int64_t w = 0; w < cols; w += W) {
        term<second>(x, out, l, r, w, p);
        total += p;
      }
      da[r * pitch + l] += sum_lanes<T>(total);
    }
  }
}

// db[k * kStrip + j] += sum over the group.
template <bool second, class T>
SAPWOOD_TARGET void exact_grad_cols(const Packed<T>& x, const Weights<T>& out, int64_t depth,
                                    int64_t rows, int64_t cols, T* db) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  for (int64_t w = 0; w < cols; w += W) {
    for (int64_t l = 0; l < depth; ++l) {
      Vec total, p;
      load<T>(total, db + l * kStrip<T> + w);
      for (int64_t r = 0; r < rows; ++r) {
        term<second>(x, out, l, r, w, p);
        total += p;
      }
      store<T>(db + l * kStrip<T> + w, total);
    }
  }
}

// mean[r, j] += sum_k p (h + g) weight, of one pass of terms.
template <class T>
SAPWOOD_TARGET void exact_means(const Packed<T>& x, const Weights<T>& out, int64_t depth,
                                int64_t rows, int64_t cols, T* mean) {
  using Vec = typename Lanes<T>::type;
  constexpr int W = Lanes<T>::count;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < cols; w += W) {
      Vec total, p, g;
      load<T>(total, mean + r * kStrip<T> + w);
      for (int64_t l = 0; l < depth; ++l) {
        term<false>(x, out, l, r, w, p);
        load<T>(g, x.g + l * kStrip<T> + w);
        total += p * (x.h[l * kGroup + r] + g);
      }
      store<T>(mean + r * kStrip<T> + w, total);
    }
  }
}

// Shift and weight of every output of a tile: 1 / sum, or 1 / count on the +inf terms, 0 where no
// term has mass, NaN where a term is NaN.
template <class T>
SAPWOOD_TARGET void exact_weights(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row0,
                                  int64_t rows, int64_t col0, int64_t cols, T* pa, T* pb,
                                  const Weights<T>& out) {
  ExactTile<T> tile;
  exact_tile<true>(a, b, k, row0, rows, col0, cols, pa, pb, false, tile);
  for (int64_t r = 0; r < kGroup; ++r) {
    for (int64_t j = 0; j < kStrip<T>; ++j) {
      const int64_t at = r * kStrip<T> + j;
      const T top = tile.top[at], sum = tile.sum[at];
      out.shift[at] = tile.shift[at];
      out.weight[at] = 0;
      if (r >= rows || j >= cols) continue;
      if (top == kInf<T>) {
        out.shift[at] = top;
        out.weight[at] = T(1) / count_infinite(a, b, k, row0 + r, col0 + j);
      } else if (top > -kInf<T> || sum != sum) {
        out.weight[at] = T(1) / sum;
      }
    }
  }
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
