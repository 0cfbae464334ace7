// The schedule of the sell format, compiled once per instruction set for its minimum over 64 rows.
namespace sapwood::masked_matmul::SAPWOOD_ISA {

constexpr int32_t kDone = INT32_MAX;  // next column of a row that has none left

// Rows whose next column lies in the 31 columns from the leftmost one, which goes to base.
SAPWOOD_TARGET SAPWOOD_INLINE uint64_t rows_of_step(const int32_t* next, int32_t& base) {
  base = kDone;
  for (int64_t r = 0; r < kSliceRows; ++r) base = next[r] < base ? next[r] : base;
  uint64_t present = 0;
#if SAPWOOD_IS_AVX512
  for (int64_t r = 0; r < kSliceRows; r += 16) {
    const __m512i ahead = _mm512_sub_epi32(_mm512_loadu_si512(next + r), _mm512_set1_epi32(base));
    present |= static_cast<uint64_t>(_mm512_cmplt_epi32_mask(ahead, _mm512_set1_epi32(kWindow)))
               << r;
  }
#else
  for (int64_t r = 0; r < kSliceRows; ++r) {
    present |= static_cast<uint64_t>(next[r] - base < kWindow) << r;
  }
#endif
  return present;
}

// The greedy schedule of one slice of at most 64 rows. A step's window begins at the leftmost
// column still waiting; every row whose next column is inside takes part. Within a row columns
// ascend, so no order of steps could be shorter for the same windows. With a null window the steps
// are only counted. Returns the number of steps.
template <class Bits, class Index>
SAPWOOD_TARGET void schedule_slice(const Bits* row_values, const Index* cols,
                                   const int64_t* row_ptr, int64_t rows, Bits* values,
                                   uint8_t* index, int32_t* window, int64_t* steps) {
  alignas(64) int32_t next[kSliceRows];
  int64_t at[kSliceRows];
  for (int64_t r = 0; r < kSliceRows; ++r) {
    at[r] = r < rows ? row_ptr[r] : 0;
    next[r] = r < rows && at[r] < row_ptr[r + 1] ? static_cast<int32_t>(cols[at[r]]) : kDone;
  }
  for (int64_t step = 0;; ++step) {
    int32_t base;
    uint64_t present = rows_of_step(next, base);
    if (base == kDone) {
      *steps = step;
      return;
    }
    if (window != nullptr) {
      window[step] = base;
      std::fill_n(values + step * kSliceRows, kSliceRows, Bits{0});
      std::fill_n(index + step * kSliceRows, kSliceRows, kAbsent);
    }
    for (; present != 0; present &= present - 1) {
      const int r = __builtin_ctzll(present);
      if (window != nullptr) {
        values[step * kSliceRows + r] = row_values[at[r]];
        index[step * kSliceRows + r] = static_cast<uint8_t>(next[r] - base);
      }
      ++at[r];
      next[r] = at[r] < row_ptr[r + 1] ? static_cast<int32_t>(cols[at[r]]) : kDone;
    }
  }
}

}  // namespace sapwood::masked_matmul::SAPWOOD_ISA
