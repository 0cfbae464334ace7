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
  typename Lanes<T>::bits_type exists{};  // of the last vector: +inf beside padding makes NaN
  for (int i = 0; i < W; ++i) exists[i] = i < cols % W ? -1 : 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < depth; ++l) {
      Vec total{}, p;
      for (int64_t w = 0; w < cols; w += W) {
        term<second>(x, out, l, r, w, p);
        if (w + W > cols) p = exists ? p : Vec{};
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

// Both gradients of a shallow tile, which are added to: every exponential is taken once and kept in
// p (k, kGroup, kStrip). Null where not wanted; da has pitch k, db has pitch n.
template <class T>
SAPWOOD_TARGET void shallow_gradients(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& grad,
                                      int64_t k, int64_t n, int64_t row0, int64_t rows,
                                      int64_t col0, int64_t cols, const Packed<T>& room, T* p,
                                      T* da, T* db) {
  using Vec = typename Lanes<T>::type;
  constexpr int64_t S = kStrip<T>;
  constexpr int W = Lanes<T>::count;
  T top[kGroup * S], weight[kGroup * S];
  std::fill_n(top, kGroup * S, -kInf<T>);
  pack_rows(a, row0, rows, 0, k, room.a);
  pack_cols(b, col0, cols, 0, k, room.b);
  exact_maxima(room.a, room.b, k, rows, cols, top);
  typename Lanes<T>::bits_type exists{};  // of the last vector: +inf beside padding makes NaN
  for (int i = 0; i < W; ++i) exists[i] = i < cols % W ? -1 : 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < cols; w += W) {
      Vec shift, y, x, sum{};
      load<T>(shift, top + r * S + w);
      shift = shift == -kInf<T> ? Vec{} : shift;
      for (int64_t l = 0; l < k; ++l) {
        load<T>(y, room.b + l * S + w);
        difference<true, T>(room.a[l * kGroup + r], y, shift, x);
        exp_nonpositive<Below::zero, T>(x);
        if (w + W > cols) x = exists ? x : Vec{};
        store<T>(p + (l * kGroup + r) * S + w, x);
        sum += x;
      }
      T given[W] = {};
      for (int64_t j = 0; j < std::min<int64_t>(W, cols - w); ++j) {
        given[j] = grad.at(row0 + r, col0 + w + j);
      }
      load<T>(y, given);
      store<T>(weight + r * S + w, y * (sum == T(0) ? Vec{} : T(1) / sum));
    }
  }
  for (int64_t l = 0; l < k; ++l) {
    T* to = db != nullptr ? db + l * n + col0 : nullptr;
    T column[S] = {};
    for (int64_t r = 0; r < rows; ++r) {
      Vec total{}, x, y, z;
      for (int64_t w = 0; w < cols; w += W) {
        load<T>(x, p + (l * kGroup + r) * S + w);
        load<T>(y, weight + r * S + w);
        load<T>(z, column + w);
        x *= y;
        total += x;
        store<T>(column + w, z + x);
      }
      if (da != nullptr) da[(row0 + r) * k + l] += sum_lanes<T>(total);
    }
    for (int64_t j = 0; to != nullptr && j < cols; ++j) to[j] += column[j];
  }
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
