// Panels: the batch transposed to (K, P), so that one weight meets P activations with vector
// instructions and every access is a full line. Compiled once per instruction set.
namespace sapwood::masked_matmul::SAPWOOD_ISA {

template <class T>
struct Lanes {
  static constexpr int count = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  using index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef index index_type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
};

// Exchanges the blocks of H lanes that lie across the diagonal of two rows of a tile.
template <int H, class T, int... L>
SAPWOOD_TARGET SAPWOOD_INLINE void swap_blocks(typename Lanes<T>::type& a,
                                               typename Lanes<T>::type& b,
                                               std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::count;
  using I = typename Lanes<T>::index_type;
  const typename Lanes<T>::type upper = __builtin_shuffle(a, b, I{((L & H) ? W + L - H : L)...});
  b = __builtin_shuffle(a, b, I{((L & H) ? W + L : L + H)...});
  a = upper;
}

template <int H, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void transpose_stages(typename Lanes<T>::type* tile) {
  constexpr int W = Lanes<T>::count;
  if constexpr (H >= 1) {
    for (int i = 0; i < W; ++i) {
      if ((i & H) == 0) {
        swap_blocks<H, T>(tile[i], tile[i + H], std::make_integer_sequence<int, W>{});
      }
    }
    transpose_stages<H / 2, T>(tile);
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows and j < cols; both at most W.
// Lanes of `to` from rows up to W are filled with zeros when pad is set, else left untouched.
template <class T, bool pad>
SAPWOOD_TARGET SAPWOOD_INLINE void transpose_tile(const T* __restrict from, int64_t from_stride,
                                                  T* __restrict to, int64_t to_stride, int64_t rows,
                                                  int64_t cols) {
  constexpr int W = Lanes<T>::count;
  if (cols == W && (pad || rows == W)) {
    typename Lanes<T>::type tile[W] = {};
    if (rows == W) {
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(&tile[i], from + i * from_stride, sizeof tile[i]);
    } else {
      for (int i = 0; i < W; ++i) {
        if (i < rows) __builtin_memcpy(&tile[i], from + i * from_stride, sizeof tile[i]);
      }
    }
    transpose_stages<W / 2, T>(tile);
    for (int i = 0; i < W; ++i) __builtin_memcpy(to + i * to_stride, &tile[i], sizeof tile[i]);
    return;
  }
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
    for (int64_t i = rows; pad && i < W; ++i) to[j * to_stride + i] = T(0);
  }
}

// Rows [first, last) of the panel (K, P): panel[c * P + b] = x[b * stride + c], 0 from b = batch.
template <class T>
SAPWOOD_TARGET void fill_panel(const T* x, int64_t stride, int64_t batch, int64_t first,
                               int64_t last, T* panel, int64_t width) {
  constexpr int W = Lanes<T>::count;
  for (int64_t c = first; c < last; c += W) {
    const int64_t cols = std::min<int64_t>(W, last - c);
    for (int64_t b = 0; b < width; b += W) {
      const int64_t rows = std::clamp<int64_t>(batch - b, 0, W);
      transpose_tile<T, true>(x + b * stride + c, stride, panel + c * width + b, width, rows, cols);
    }
  }
}

template <Activation activation, class T>
SAPWOOD_TARGET SAPWOOD_INLINE void activate(T* __restrict v, int64_t count, T bias) {
  for (int64_t i = 0; i < count; ++i) {
    const T s = v[i] + bias;
    if constexpr (activation == Activation::none) v[i] = s;
    if constexpr (activation == Activation::relu) v[i] = math::relu(s);
    if constexpr (activation == Activation::gelu) v[i] = math::gelu(s);
    if constexpr (activation == Activation::gelu_tanh) v[i] = math::gelu_tanh(s);
    if constexpr (activation == Activation::silu) v[i] = math::silu(s);
  }
}

template <class T>
SAPWOOD_TARGET SAPWOOD_OUTLINE void activate_row(T* v, int64_t count, T bias,
                                                 Activation activation) {
  switch (activation) {
    case Activation::none:
      return activate<Activation::none>(v, count, bias);
    case Activation::relu:
      return activate<Activation::relu>(v, count, bias);
    case Activation::gelu:
      return activate<Activation::gelu>(v, count, bias);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(v, count, bias);
    case Activation::silu:
      return activate<Activation::silu>(v, count, bias);
  }
}

// y[b, first + r] = activation(sums[r, b] + bias) for `rows` output columns and `batch` rows of y.
template <class T>
SAPWOOD_TARGET SAPWOOD_OUTLINE void store_sums(T* sums, int64_t width, int64_t rows, int64_t first,
                                               int64_t b0, int64_t batch, const Output<T>& out) {
  constexpr int W = Lanes<T>::count;
  if (out.bias != nullptr || out.activation != Activation::none) {
    for (int64_t r = 0; r < rows; ++r) {
      const T bias = out.bias != nullptr ? out.bias[first + r] : T(0);
      activate_row(sums + r * width, batch, bias, out.activation);
    }
  }
  for (int64_t r = 0; r < rows; r += W) {
    for (int64_t b = 0; b < batch; b += W) {
      transpose_tile<T, false>(sums + r * width + b, width, out.y + (b0 + b) * out.n + first + r,
                               out.n, std::min<int64_t>(W, rows - r),
                               std::min<int64_t>(W, batch - b));
    }
  }
}

// Values as T: in place, or converted to scratch (count,).
template <class T, class Value>
SAPWOOD_TARGET SAPWOOD_INLINE const T* decoded(const Value* values, int64_t count, T* scratch) {
  if constexpr (std::is_same_v<T, Value>) {
    return values;
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = widen(values[i]);
    return scratch;
  }
}

template <class T, int P>
struct RowSums {
  static constexpr int vectors = P / Lanes<T>::count;
  // Independent chains: an FMA takes four cycles and two start per cycle.
  static constexpr int sets = vectors >= 8 ? 1 : vectors == 4 ? 2 : 4;
  typename Lanes<T>::type acc[sets][vectors] = {};
};

constexpr int64_t kPrefetchAhead = 16;  // non-zeros; a panel row comes from L2 in about that time

template <bool prefetch, int sets, class T, int P, class Index>
SAPWOOD_TARGET SAPWOOD_INLINE void add_products(RowSums<T, P>& sums, const T* __restrict panel,
                                                const T* __restrict values,
                                                const Index* __restrict cols) {
  for (int s = 0; s < sets; ++s) {
    const T* x = panel + static_cast<int64_t>(cols[s]) * P;
    const T weight = values[s];
    if constexpr (prefetch) {
      const T* later = panel + static_cast<int64_t>(cols[s + kPrefetchAhead]) * P;
      for (size_t line = 0; line < P; line += 64 / sizeof(T)) __builtin_prefetch(later + line);
    }
    for (int j = 0; j < RowSums<T, P>::vectors; ++j) {
      typename Lanes<T>::type activations;
      __builtin_memcpy(&activations, x + j * Lanes<T>::count, sizeof activations);
      sums.acc[s][j] += weight * activations;
    }
  }
}

// sums[b] (+)= sum_p values[p] * panel[cols[p], b]; `readable` entries of cols may be read.
template <int P, class T, class Index>
SAPWOOD_TARGET SAPWOOD_INLINE void row_times_panel(const T* panel, const T* values,
                                                   const Index* cols, int64_t count,
                                                   int64_t readable, bool add, T* sums) {
  using R = RowSums<T, P>;
  R r;
  if (add) __builtin_memcpy(&r.acc[0], sums, sizeof r.acc[0]);
  int64_t p = 0;
  const int64_t ahead = std::min(count, readable - kPrefetchAhead);
  for (; p + R::sets <= ahead; p += R::sets) {
    add_products<true, R::sets>(r, panel, values + p, cols + p);
  }
  for (; p + R::sets <= count; p += R::sets) {
    add_products<false, R::sets>(r, panel, values + p, cols + p);
  }
  for (; p < count; ++p) add_products<false, 1>(r, panel, values + p, cols + p);
  for (int j = 0; j < R::vectors; ++j) {
    for (int s = 1; s < R::sets; ++s) r.acc[0][j] += r.acc[s][j];
  }
  __builtin_memcpy(sums, &r.acc[0], sizeof r.acc[0]);
}

// The entries of a row with columns below a limit, given where the search begins.
template <class Index>
SAPWOOD_TARGET SAPWOOD_INLINE int64_t end_below(const Index* cols, int64_t begin, int64_t end,
                                                int64_t limit) {
  return std::lower_bound(cols + begin, cols + end, limit,
                          [](Index c, int64_t l) { return static_cast<int64_t>(c) < l; }) -
         cols;
}

// Rows [first, first + rows) of w times one panel; sums (rows, P), scratch (K,). Where the panel is
// larger than its share of L2, the rows are walked once per block of columns.
template <int P, class T, class Value, class Index>
SAPWOOD_TARGET void csr_chunk(const Csr<Value, Index>& w, int64_t first, int64_t rows,
                              const T* panel, T* sums, T* scratch) {
  const int64_t nnz = w.row_ptr[w.n], block = panel_block(P, sizeof(T));
  int64_t next[kChunkRows];
  std::copy_n(w.row_ptr + first, rows, next);
  int64_t c = 0;
  do {
    const bool last = c + block >= w.k;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t begin = next[r], row_end = w.row_ptr[first + r + 1];
      const int64_t end = last ? row_end : end_below(w.cols, begin, row_end, c + block);
      const T* values = decoded(w.values + begin, end - begin, scratch);
      row_times_panel<P>(panel, values, w.cols + begin, end - begin, nnz - begin, c > 0,
                         sums + r * P);
      next[r] = end;
    }
    c += block;
  } while (c < w.k);
}

template <class T, class Value, class Index>
SAPWOOD_TARGET inline void csr_chunk_of(const Csr<Value, Index>& w, int64_t first, int64_t rows,
                                        const T* panel, int64_t width, T* sums, T* scratch) {
  switch (width) {
    case 16:
      return csr_chunk<16>(w, first, rows, panel, sums, scratch);
    case 32:
      return csr_chunk<32>(w, first, rows, panel, sums, scratch);
    default:
      return csr_chunk<64>(w, first, rows, panel, sums, scratch);
  }
}

}  // namespace sapwood::masked_matmul::SAPWOOD_ISA
