// From a dense weight and its mask to the storage formats. Values are moved as bit patterns, so one
// instance serves every type of that size. Scratch is the caller's; nothing allocates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "masked_matmul/formats.h"

namespace sapwood::masked_matmul {

// counts[row] = set entries of mask (N, K) in rows [first, last).
inline void count_rows(const uint8_t* mask, int64_t k, int64_t first, int64_t last,
                       int64_t* counts) {
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* m = mask + row * k;
    int64_t count = 0;
    for (int64_t c = 0; c < k; ++c) count += m[c] != 0;
    counts[row] = count;
  }
}

// In place: row_ptr[0] = 0 and row_ptr[i + 1] holds the count of row i; afterwards its end.
inline void counts_to_ends(int64_t* row_ptr, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row_ptr[i + 1] += row_ptr[i];
}

// One row without a branch per column: every column is written, the cursor advances over set ones.
// Scratch holds k + 1 entries each; the set entries are its first ones. Returns their number.
template <class Bits, class Index>
int64_t compact_row(const Bits* weight, const uint8_t* mask, int64_t k, Bits* values, Index* cols) {
  int64_t count = 0;
  for (int64_t c = 0; c < k; ++c) {
    values[count] = weight[c];
    cols[count] = static_cast<Index>(c);
    count += mask[c] != 0;
  }
  return count;
}

// Rows sorted by their number of weights, descending and stable, inside chunks of kChunkRows.
inline void order_rows(const int64_t* row_ptr, int64_t n, int32_t* order) {
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t first = 0; first < n; first += kChunkRows) {
    std::stable_sort(order + first, order + std::min(n, first + kChunkRows),
                     [row_ptr](int32_t a, int32_t b) {
                       return row_ptr[a + 1] - row_ptr[a] > row_ptr[b + 1] - row_ptr[b];
                     });
  }
}

// Bit c of word j <=> mask[16 j + c].
inline void pack_words(const uint8_t* mask, int64_t k, uint16_t* words) {
  for (int64_t j = 0; j * kWordBits < k; ++j) {
    const int64_t width = std::min(kWordBits, k - j * kWordBits);
    uint32_t word = 0;
    for (int64_t c = 0; c < width; ++c) word |= (mask[j * kWordBits + c] != 0 ? 1u : 0u) << c;
    words[j] = static_cast<uint16_t>(word);
  }
}

// The greedy schedule of one slice of at most 64 rows. A step's window begins at the leftmost
// column still waiting; every row whose next column is inside takes part. Within a row columns
// ascend, so no order of steps could be shorter for the same windows. With null outputs the steps
// are only counted. Returns the number of steps.
template <class Bits, class Index>
int64_t schedule_slice(const Bits* row_values, const Index* cols, const int64_t* row_ptr,
                       int64_t rows, Bits* values, uint8_t* index, int32_t* window) {
  constexpr int32_t done = INT32_MAX;
  int32_t next[kSliceRows];
  int64_t at[kSliceRows];
  for (int64_t r = 0; r < kSliceRows; ++r) {
    at[r] = r < rows ? row_ptr[r] : 0;
    next[r] = r < rows && row_ptr[r] < row_ptr[r + 1] ? static_cast<int32_t>(cols[at[r]]) : done;
  }
  for (int64_t step = 0;; ++step) {
    const int32_t base = *std::min_element(next, next + kSliceRows);
    if (base == done) return step;
    if (window != nullptr) window[step] = base;
    for (int64_t r = 0; r < kSliceRows; ++r) {
      const bool present = next[r] - base < kWindow;  // done - base is never that small
      if (window != nullptr) {
        values[step * kSliceRows + r] = present ? row_values[at[r]] : Bits{0};
        index[step * kSliceRows + r] = present ? static_cast<uint8_t>(next[r] - base) : kAbsent;
      }
      if (!present) continue;
      ++at[r];
      next[r] = at[r] < row_ptr[r + 1] ? static_cast<int32_t>(cols[at[r]]) : done;
    }
  }
}

// Compressed columns of a compressed-rows structure: rows_t ascending inside each column, and perm
// so that values_t = values[perm]. column_ptr (K + 1,); cursor (K,) is scratch.
template <class Index, class IndexT>
void transpose_structure(const Index* cols, const int64_t* row_ptr, int64_t n, int64_t k,
                         int64_t* column_ptr, IndexT* rows_t, int64_t* perm, int64_t* cursor) {
  std::fill(column_ptr, column_ptr + k + 1, 0);
  for (int64_t p = 0; p < row_ptr[n]; ++p) ++column_ptr[static_cast<int64_t>(cols[p]) + 1];
  counts_to_ends(column_ptr, k);
  std::copy(column_ptr, column_ptr + k, cursor);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t p = row_ptr[row]; p < row_ptr[row + 1]; ++p) {
      const int64_t to = cursor[cols[p]]++;
      rows_t[to] = static_cast<IndexT>(row);
      perm[to] = p;
    }
  }
}

}  // namespace sapwood::masked_matmul
