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
