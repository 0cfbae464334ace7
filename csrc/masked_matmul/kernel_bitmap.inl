// Bitmap rows. Batches up to 8 with AVX-512 expand 16 weights at a time against x as it lies;
// everything else lists the columns of a row and goes through the panel kernel.
namespace sapwood::masked_matmul::SAPWOOD_ISA {

#if SAPWOOD_IS_AVX512
// The destination is zeroed by an instruction of its own: on Zen 5 vexpandps depends on its old
// destination even when it zeroes, and gcc picks any register.
SAPWOOD_TARGET SAPWOOD_INLINE __m512 expand(__mmask16 mask, const float* values) {
  __m512 result;
  asm("vpxord %0, %0, %0\n\tvexpandps %1, %0%{%2%}"
      : "=&v"(result)
      : "m"(*reinterpret_cast<const float(*)[16]>(values)), "Yk"(mask));
  return result;
}

// `Words` words of R rows: one load of the bits and one popcount move a row's cursor, so that the
// cursors' dependency is a quarter as long as the words.
template <int Words, int R, int B>
SAPWOOD_TARGET SAPWOOD_INLINE void expand_words(const float** values, const uint16_t* words,
                                                int64_t words_per_row, const float* x,
                                                int64_t stride, __m512 (&acc)[R][B]) {
  uint64_t bits[R];
  const float* from[R];
  for (int r = 0; r < R; ++r) {
    bits[r] = 0;
    __builtin_memcpy(&bits[r], words + r * words_per_row, Words * sizeof(uint16_t));
    from[r] = values[r];
    values[r] += __builtin_popcountll(bits[r]);
    __builtin_prefetch(from[r] + 64);
    if constexpr (Words > 1) __builtin_prefetch(from[r] + 80);
  }
  for (int t = 0; t < Words; ++t) {
    __m512 activations[B];
    for (int b = 0; b < B; ++b) activations[b] = _mm512_loadu_ps(x + b * stride + t * kWordBits);
    for (int r = 0; r < R; ++r) {
      const __mmask16 mask = words[r * words_per_row + t];
      const uint64_t before = bits[r] & ((uint64_t{1} << (t * kWordBits)) - 1);
      const __m512 weights = expand(mask, from[r] + __builtin_popcountll(before));
      for (int b = 0; b < B; ++b) {
        acc[r][b] = _mm512_mask3_fmadd_ps(weights, activations[b], acc[r][b], mask);
      }
    }
  }
}

// sums[b * R + r] for R rows against B activations x (B, stride); one chain per row and batch row,
// words in ascending order, so that the result does not depend on R.
template <int R, int B>
SAPWOOD_TARGET SAPWOOD_INLINE void expand_rows(const float* const* row_values,
                                               const uint16_t* words, int64_t words_per_row,
                                               const float* x, int64_t stride, float* sums) {
  __m512 acc[R][B];
  const float* values[R];
  for (int r = 0; r < R; ++r) {
    values[r] = row_values[r];
    for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_ps();
  }
  int64_t j = 0;
  for (; j + 4 <= words_per_row; j += 4) {
    expand_words<4>(values, words + j, words_per_row, x + j * kWordBits, stride, acc);
  }
  for (; j < words_per_row; ++j) {
    expand_words<1>(values, words + j, words_per_row, x + j * kWordBits, stride, acc);
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[b * R + r] = _mm512_reduce_add_ps(acc[r][b]);
  }
}

// The rows that are left over: one copy for all types of weights.
template <int B>
SAPWOOD_TARGET SAPWOOD_OUTLINE void expand_row(const float* values, const uint16_t* words,
                                               int64_t words_per_row, const float* x,
                                               int64_t stride, float* sums) {
  expand_rows<1, B>(&values, words, words_per_row, x, stride, sums);
}

// Rows [first, first + rows) against B rows of x (B, stride), stride a multiple of 16 and at least
// K; scratch (4 * K,). Writes y[b, row] for b < batch.
template <int B, class Value>
SAPWOOD_TARGET void bitmap_rows(const Bitmap<Value>& w, int64_t first, int64_t rows, const float* x,
                                int64_t stride, int64_t b0, int64_t batch, float* scratch,
                                const Output<float>& out) {
  constexpr int R = B <= 4 ? 4 : 2;
  const int64_t words_per_row = w.words_per_row();
  for (int64_t i = first; i < first + rows; i += R) {
    const int64_t group = std::min<int64_t>(R, first + rows - i);
    const float* values[R];
    float sums[R * B];
    for (int64_t r = 0; r < group; ++r) {
      const int64_t begin = w.row_ptr[i + r];
      values[r] = decoded(w.values + begin, w.row_ptr[i + r + 1] - begin, scratch + r * w.k);
    }
    const uint16_t* words = w.words + i * words_per_row;
    if (group == R) {
      expand_rows<R, B>(values, words, words_per_row, x, stride, sums);
    } else {
      for (int64_t r = 0; r < group; ++r) {
        float one[B];
        expand_row<B>(values[r], words + r * words_per_row, words_per_row, x, stride, one);
        for (int b = 0; b < B; ++b) sums[b * R + r] = one[b];
      }
    }
    for (int64_t r = 0; r < group; ++r) {
      const float bias = out.bias != nullptr ? out.bias[i + r] : 0.0f;
      for (int64_t b = 0; b < batch; ++b) out.y[(b0 + b) * out.n + i + r] = sums[b * R + r] + bias;
    }
  }
  if (out.activation == Activation::none) return;
  for (int64_t b = 0; b < batch; ++b) {
    activate_row(out.y + (b0 + b) * out.n + first, rows, 0.0f, out.activation);
  }
}
#endif

// The set columns of words [begin, end) of a row, ascending; returns their number. Whole groups of
// 16 are written, the cursor advances over set ones: no branch depends on the mask. cols holds 16
// entries more than there are.
SAPWOOD_TARGET inline int64_t list_columns(const uint16_t* words, int64_t begin, int64_t end,
                                           int32_t* cols) {
  const int32_t* const start = cols;
  for (int64_t j = begin; j < end; ++j) {
    const int32_t first = static_cast<int32_t>(j * kWordBits);
#if SAPWOOD_IS_AVX512
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(cols, _mm512_maskz_compress_epi32(words[j], all));
    cols += __builtin_popcount(words[j]);
#else
    for (int32_t c = 0; c < kWordBits; ++c) {
      *cols = first + c;
      cols += words[j] >> c & 1;
    }
#endif
  }
  return cols - start;
}

// As csr_chunk; cols (K + 16,) and scratch (K,).
template <int P, class T, class Value>
SAPWOOD_TARGET void bitmap_chunk(const Bitmap<Value>& w, int64_t first, int64_t rows,
                                 const T* panel, T* sums, int32_t* cols, T* scratch) {
  const int64_t words_per_row = w.words_per_row();
  const int64_t block = panel_block(P, sizeof(T)) / kWordBits;
  int64_t next[kChunkRows];
  std::copy_n(w.row_ptr + first, rows, next);
  int64_t j = 0;
  do {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = list_columns(w.words + (first + r) * words_per_row, j,
                                         std::min(words_per_row, j + block), cols);
      const T* values = decoded(w.values + next[r], count, scratch);
      row_times_panel<P>(panel, values, cols, count, count, j > 0, sums + r * P);
      next[r] += count;
    }
    j += block;
  } while (j < words_per_row);
}

template <class T, class Value>
SAPWOOD_TARGET inline void bitmap_chunk_of(const Bitmap<Value>& w, int64_t first, int64_t rows,
                                           const T* panel, int64_t width, T* sums, int32_t* cols,
                                           T* scratch) {
  switch (width) {
    case 16:
      return bitmap_chunk<16>(w, first, rows, panel, sums, cols, scratch);
    case 32:
      return bitmap_chunk<32>(w, first, rows, panel, sums, cols, scratch);
    default:
      return bitmap_chunk<64>(w, first, rows, panel, sums, cols, scratch);
  }
}

}  // namespace sapwood::masked_matmul::SAPWOOD_ISA
