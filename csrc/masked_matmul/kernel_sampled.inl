// The weight gradient at the mask's positions only, and the mask itself for the dense path.
namespace sapwood::masked_matmul::SAPWOOD_ISA {

// One level of the sum tree: lanes of a (then b) added in neighbouring pairs.
template <class T, int... L>
SAPWOOD_TARGET SAPWOOD_INLINE void add_neighbours(typename Lanes<T>::type& into,
                                                  const typename Lanes<T>::type& a,
                                                  const typename Lanes<T>::type& b,
                                                  std::integer_sequence<int, L...>) {
  using I = typename Lanes<T>::index_type;
  into = __builtin_shuffle(a, b, I{(2 * L)...}) + __builtin_shuffle(a, b, I{(2 * L + 1)...});
}

// products[i] becomes a vector whose lanes, summed, are the i-th dot product; the result's lane i
// is that sum. W vectors in, 2 shuffles per dot product instead of a reduction each.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void sum_lanes(typename Lanes<T>::type* products) {
  constexpr int W = Lanes<T>::count;
  for (int live = W; live > 1; live /= 2) {
    for (int i = 0; i < live / 2; ++i) {
      add_neighbours<T>(products[i], products[2 * i], products[2 * i + 1],
                        std::make_integer_sequence<int, W>{});
    }
  }
}

// out[p] (+)= sum_b grad_row[b] * panel[cols[p], b] for one row of the structure.
template <int P, class T, class Index>
SAPWOOD_TARGET SAPWOOD_INLINE void sampled_row(const T* grad_row, const T* panel, const Index* cols,
                                               int64_t count, int64_t readable, bool add, T* out) {
  constexpr int W = Lanes<T>::count, vectors = P / W;
  using V = typename Lanes<T>::type;
  V grad[vectors];
  for (int j = 0; j < vectors; ++j) __builtin_memcpy(&grad[j], grad_row + j * W, sizeof grad[j]);
  for (int64_t p = 0; p < count; p += W) {
    const int64_t live = std::min<int64_t>(W, count - p);
    V products[W] = {};
    for (int i = 0; i < W; ++i) {
      if (i >= live) break;
      const T* x = panel + static_cast<int64_t>(cols[p + i]) * P;
      if (p + i + kPrefetchAhead < readable) {
        const T* later = panel + static_cast<int64_t>(cols[p + i + kPrefetchAhead]) * P;
        for (size_t line = 0; line < P; line += 64 / sizeof(T)) __builtin_prefetch(later + line);
      }
      V sum = {};
      for (int j = 0; j < vectors; ++j) {
        V activations;
        __builtin_memcpy(&activations, x + j * W, sizeof activations);
        sum += grad[j] * activations;
      }
      products[i] = sum;
    }
    sum_lanes<T>(products);
    T dots[W];
    __builtin_memcpy(dots, &products[0], sizeof dots);
    for (int64_t i = 0; i < live; ++i) out[p + i] = add ? out[p + i] + dots[i] : dots[i];
  }
}

// Rows [first, first + rows), at most kChunkRows: grad (N, P) and panel (K, P) of the same batch
// rows; out (nnz,). Columns in blocks as in csr_chunk.
template <int P, class T, class Index>
SAPWOOD_TARGET void sampled_rows(const T* grad, const T* panel, int64_t k, const Index* cols,
                                 const int64_t* row_ptr, int64_t first, int64_t rows, int64_t nnz,
                                 bool add, T* out) {
  const int64_t block = panel_block(P, sizeof(T));
  int64_t next[kChunkRows];
  std::copy_n(row_ptr + first, rows, next);
  int64_t c = 0;
  do {
    const bool last = c + block >= k;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t begin = next[r], row_end = row_ptr[first + r + 1];
      const int64_t end = last ? row_end : end_below(cols, begin, row_end, c + block);
      sampled_row<P>(grad + (first + r) * P, panel, cols + begin, end - begin, nnz - begin, add,
                     out + begin);
      next[r] = end;
    }
    c += block;
  } while (c < k);
}

template <class T, class Index>
SAPWOOD_TARGET inline void sampled_rows_of(const T* grad, const T* panel, int64_t width, int64_t k,
                                           const Index* cols, const int64_t* row_ptr, int64_t first,
                                           int64_t rows, int64_t nnz, bool add, T* out) {
  switch (width) {
    case 16:
      return sampled_rows<16>(grad, panel, k, cols, row_ptr, first, rows, nnz, add, out);
    case 32:
      return sampled_rows<32>(grad, panel, k, cols, row_ptr, first, rows, nnz, add, out);
    default:
      return sampled_rows<64>(grad, panel, k, cols, row_ptr, first, rows, nnz, add, out);
  }
}

// out = where(mask, weight, 0) on bit patterns; out may be weight. NaN off the mask is dropped.
template <class Bits>
SAPWOOD_TARGET void apply_mask(const Bits* weight, const uint8_t* mask, Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = weight[i] & (mask[i] != 0 ? static_cast<Bits>(~Bits{0}) : Bits{0});
  }
}

}  // namespace sapwood::masked_matmul::SAPWOOD_ISA
