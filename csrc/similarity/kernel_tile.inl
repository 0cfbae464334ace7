// The register tile: rows x columns sums over the whole depth, compared with their limits before
// anything is written. Compiled once per instruction set.
namespace sapwood::similarity::SAPWOOD_ISA {

template <class T>
struct Registers {
  static constexpr int lanes = SAPWOOD_VECTOR_BYTES / static_cast<int>(sizeof(T));
  static constexpr int vectors = 2;  // per row of the tile
  // 32 registers: 28 sums, 2 vectors of the panel, one row entry. 16 registers: 12, 2 and 1.
  static constexpr int rows = SAPWOOD_IS_AVX512 ? 14 : 6;
  static constexpr int columns = vectors * lanes;
  typedef T type __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Int mask __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  static_assert(columns <= kMaxPanel && kStripRows % rows == 0);
};

template <class T>
SAPWOOD_TARGET void tile_shape(Tile& tile) {
  tile = {Registers<T>::rows, Registers<T>::columns};
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE typename Registers<T>::type load_vector(const T* from) {
  typename Registers<T>::type v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// sums[r][v] over the depth; the order of additions is fixed, whatever surrounds the tile.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void multiply(const T* __restrict rows, const T* __restrict panel,
                                            int64_t k, typename Registers<T>::type (&sums)[14][2]) {
  using R = Registers<T>;
#pragma GCC unroll 16
  for (int r = 0; r < R::rows; ++r) sums[r][0] = sums[r][1] = typename R::type{};
  for (int64_t c = 0; c < k; ++c) {
    const typename R::type low = load_vector(panel), high = load_vector(panel + R::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r) {
#if defined(SAPWOOD_BF16_PAIRS)
      int32_t pair = 0;
      __builtin_memcpy(&pair, rows + r, sizeof pair);
      const auto both = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = (typename R::type)_mm512_dpbf16_ps((__m512)sums[r][0], both, (__m512bh)low);
      sums[r][1] = (typename R::type)_mm512_dpbf16_ps((__m512)sums[r][1], both, (__m512bh)high);
#else
      sums[r][0] += rows[r] * low;
      sums[r][1] += rows[r] * high;
#endif
    }
    rows += R::rows;
    panel += R::columns;
  }
}

// 2 product - offsets, never above 0: a squared distance is not negative.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void to_distances(const T* row_offset, const T* column_offset,
                                                typename Registers<T>::type (&sums)[14][2]) {
  using R = Registers<T>;
#pragma GCC unroll 16
  for (int r = 0; r < R::rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < R::vectors; ++v) {
      const typename R::type value =
          T(2) * sums[r][v] - (row_offset[r] + load_vector(column_offset + v * R::lanes));
      sums[r][v] = value < T(0) ? value : typename R::type{};
    }
  }
}

template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE typename Registers<T>::type magnitude(typename Registers<T>::type v) {
  return v < T(0) ? -v : v;
}

// Whether any value reaches the smaller of its limits.
template <bool absolute, class T>
SAPWOOD_TARGET SAPWOOD_INLINE bool any_hit(typename Registers<T>::type (&sums)[14][2],
                                           const T* row_limit, const T* column_limit) {
  using R = Registers<T>;
  const typename R::type low = load_vector(column_limit);
  const typename R::type high = load_vector(column_limit + R::lanes);
  typename R::mask hits = {};
#pragma GCC unroll 16
  for (int r = 0; r < R::rows; ++r) {
    const typename R::type limit = row_limit[r] - typename R::type{};
    const typename R::type a = absolute ? magnitude<T>(sums[r][0]) : sums[r][0];
    const typename R::type b = absolute ? magnitude<T>(sums[r][1]) : sums[r][1];
    hits |= a >= (limit < low ? limit : low);
    hits |= b >= (limit < high ? limit : high);
  }
  typename R::Int any = 0;
  for (int i = 0; i < R::lanes; ++i) any |= hits[i];
  return any != 0;
}

// Appends the hits of a stored tile, rows first.
template <bool absolute, class T>
SAPWOOD_TARGET SAPWOOD_INLINE int64_t collect(const T* values, const T* row_limit,
                                              const T* column_limit, int64_t first_row,
                                              Candidate<T>* out, int64_t count) {
  using R = Registers<T>;
  for (int r = 0; r < R::rows; ++r) {
    const T* row = values + r * R::columns;
    uint32_t hits = 0;
    for (int j = 0; j < R::columns; ++j) {
      const T key = absolute ? (row[j] < 0 ? -row[j] : row[j]) : row[j];
      const T limit = row_limit[r] < column_limit[j] ? row_limit[r] : column_limit[j];
      hits |= static_cast<uint32_t>(key >= limit) << j;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int j = __builtin_ctz(hits);
      out[count++] = {static_cast<uint16_t>(first_row + r), static_cast<uint16_t>(j), row[j]};
    }
  }
  return count;
}

template <bool absolute, class T>
SAPWOOD_TARGET int64_t propose_of(const Strip<T>& strip, Candidate<T>* out) {
  using R = Registers<T>;
  alignas(64) T values[R::rows * R::columns];
  int64_t count = 0;
  for (int64_t m = 0; m < strip.micro_tiles; ++m) {
    typename R::type sums[14][2];
    multiply(strip.rows + m * R::rows * strip.k, strip.panel, strip.k, sums);
    if (strip.euclidean) to_distances(strip.row_offset + m * R::rows, strip.column_offset, sums);
    const T* row_limit = strip.row_limit + m * R::rows;
    if (!any_hit<absolute>(sums, row_limit, strip.column_limit)) continue;
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r) {
      __builtin_memcpy(values + r * R::columns, &sums[r][0], sizeof sums[r][0]);
      __builtin_memcpy(values + r * R::columns + R::lanes, &sums[r][1], sizeof sums[r][1]);
    }
    count = collect<absolute>(values, row_limit, strip.column_limit, m * R::rows, out, count);
  }
  return count;
}

// All candidates of a strip in order of micro tile, row, column; room for kMaxCandidates.
template <class T>
SAPWOOD_TARGET void propose(const Strip<T>& strip, Candidate<T>* out, int64_t& count) {
  count = strip.absolute ? propose_of<true>(strip, out) : propose_of<false>(strip, out);
}

}  // namespace sapwood::similarity::SAPWOOD_ISA
