// Sell with a sliding window: 64 rows advance together, a step brings each of them at most one
// weight, whose column lies in the step's window of 31. One loop, no branch but its end.
namespace sapwood::masked_matmul::SAPWOOD_ISA {

constexpr int kSellBatch = 4;  // batch rows per pass: 4 x 64 sums fill 16 of the 32 registers

// sums (B, 64) of the steps [begin, end) for B rows of x (B, stride); stride >= K + 32.
template <int B, class T, class Value>
SAPWOOD_TARGET void sell_steps(const Sell<Value>& w, int64_t begin, int64_t end, const T* x,
                               int64_t stride, T* sums) {
  for (int64_t i = 0; i < B * kSliceRows; ++i) sums[i] = T(0);
  for (int64_t step = begin; step < end; ++step) {
    const Value* values = w.values + step * kSliceRows;
    const uint8_t* index = w.index + step * kSliceRows;
    for (int b = 0; b < B; ++b) {
      T reach[kWindow + 1];
      for (int64_t c = 0; c < kWindow; ++c) reach[c] = x[b * stride + w.window[step] + c];
      reach[kAbsent] = T(0);  // an absent lane adds 0 * 0, whatever x holds
      for (int64_t r = 0; r < kSliceRows; ++r) {
        sums[b * kSliceRows + r] += widen(values[r]) * reach[index[r]];
      }
    }
  }
}

#if SAPWOOD_IS_AVX512
SAPWOOD_TARGET SAPWOOD_INLINE __m512 sixteen_values(const float* v) {
  return _mm512_loadu_ps(v);
}
SAPWOOD_TARGET SAPWOOD_INLINE __m512 sixteen_values(const BFloat16* v) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
SAPWOOD_TARGET SAPWOOD_INLINE __m512 sixteen_values(const Float16* v) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
}

// x of the window sits in two registers; vpermt2ps picks 16 of its 32 floats. The load's mask
// zeroes the last slot, the one absent lanes point to.
template <int B, class Value>
SAPWOOD_TARGET void sell_steps(const Sell<Value>& w, int64_t begin, int64_t end, const float* x,
                               int64_t stride, float* sums) {
  constexpr int V = kSliceRows / 16;
  constexpr int64_t ahead = 1024 / sizeof(Value);
  __m512 acc[V][B];
  for (int v = 0; v < V; ++v) {
    for (int b = 0; b < B; ++b) acc[v][b] = _mm512_setzero_ps();
  }
  for (int64_t step = begin; step < end; ++step) {
    const Value* values = w.values + step * kSliceRows;
    const uint8_t* index = w.index + step * kSliceRows;
    const float* reach = x + w.window[step];
    __builtin_prefetch(index + 1024);
    for (size_t line = 0; line < kSliceRows * sizeof(Value); line += 64) {
      __builtin_prefetch(values + ahead + line / sizeof(Value));
    }
    for (int b = 0; b < B; ++b) {
      const __m512 low = _mm512_loadu_ps(reach + b * stride);
      const __m512 high = _mm512_maskz_loadu_ps(0x7fff, reach + b * stride + 16);
      for (int v = 0; v < V; ++v) {
        const __m512i pick =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index + 16 * v)));
        acc[v][b] = _mm512_fmadd_ps(sixteen_values(values + 16 * v),
                                    _mm512_permutex2var_ps(low, pick, high), acc[v][b]);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int b = 0; b < B; ++b) _mm512_storeu_ps(sums + b * kSliceRows + 16 * v, acc[v][b]);
  }
}
#endif

// y[b0 .. b0 + batch, rows of the slice] for at most kSellBatch rows of x (batch, stride).
template <class T, class Value>
SAPWOOD_TARGET void sell_slice(const Sell<Value>& w, int64_t slice, const T* x, int64_t stride,
                               int64_t b0, int64_t batch, const Output<T>& out) {
  const int64_t begin = w.slice_ptr[slice], end = w.slice_ptr[slice + 1];
  const int64_t first = slice * kSliceRows, rows = std::min(kSliceRows, w.n - first);
  alignas(64) T sums[kSellBatch * kSliceRows];
  switch (batch) {
    case 1:
      sell_steps<1>(w, begin, end, x, stride, sums);
      break;
    case 2:
      sell_steps<2>(w, begin, end, x, stride, sums);
      break;
    case 3:
      sell_steps<3>(w, begin, end, x, stride, sums);
      break;
    default:
      sell_steps<4>(w, begin, end, x, stride, sums);
      break;
  }
  for (int64_t b = 0; b < batch; ++b) {
    T* y = out.y + (b0 + b) * out.n + first;
    for (int64_t r = 0; r < rows; ++r) {
      y[r] = sums[b * kSliceRows + r] + (out.bias != nullptr ? out.bias[first + r] : T(0));
    }
    if (out.activation != Activation::none) activate_row(y, rows, T(0), out.activation);
  }
}

}  // namespace sapwood::masked_matmul::SAPWOOD_ISA
