// log_matmul: values.
#pragma once

#include "logsemiring/cpu_gemm.h"

namespace sapwood::logsemiring {

inline constexpr int64_t kSmall = 2048;  // terms up to which the exact kernel is the faster one

// Rows [row0, row0 + rows) of one strip of c by the exact kernel, where `open` says so.
template <class T>
void exact_strip(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row0, int64_t rows,
                 int64_t col0, int64_t cols, const uint8_t* open, ExactScratch<T>& scratch, T* c,
                 int64_t pitch) {
  bool ready = false;
  for (int64_t g = 0; g * kGroup < rows; ++g) {
    if (open != nullptr && open[g] == 0) continue;
    SAPWOOD_ISA_CALL(exact_forward(a, b, k, row0 + g * kGroup, std::min(kGroup, rows - g * kGroup),
                                   col0, cols, scratch.a(), scratch.b(), ready,
                                   c + g * kGroup * pitch, pitch));
    ready = true;
  }
}

template <class T>
void exact_matmul(const Matrix<T>& a, const Matrix<T>& b, int64_t m, int64_t n, int64_t k, T* c) {
  const int64_t strips = round_up(n, kStrip<T>) / kStrip<T>,
                blocks = round_up(m, kTileRows) / kTileRows;
  const int64_t per_task = kTileRows * kStrip<T> * std::max<int64_t>(k, 1);
  parallel_range(strips * blocks, std::max<int64_t>(1, kTermsPerTask / per_task),
                 [&](int64_t begin, int64_t end) {
                   ExactScratch<T> scratch(k);
                   for (int64_t t = begin; t < end; ++t) {
                     const int64_t row = t / strips * kTileRows, col = t % strips * kStrip<T>;
                     exact_strip<T>(a, b, k, row, std::min(kTileRows, m - row), col,
                                    std::min(kStrip<T>, n - col), nullptr, scratch,
                                    c + row * n + col, n);
                   }
                 });
}

template <class T>
void certified_matmul(const Matrix<T>& a, const Matrix<T>& b, int64_t m, int64_t n, int64_t k,
                      T* c) {
  const Shifts<T> shifts(a, b, m, n, k);
  const Operand<T> left{a.data, a.row_stride, a.col_stride, shifts.row_shift, nullptr};
  const Operand<T> right{b.data, b.col_stride, b.row_stride, shifts.col_shift, nullptr};
  const T least = certificate<T>(k);
  packed_product<T>(
      left, right, m, n, k, true,
      [&](int64_t row, int64_t rows, int64_t col, int64_t cols, const T* sums) {
        ExactScratch<T> scratch(k);
        for (int64_t s = 0; s < cols; s += kStrip<T>) {
          const int64_t count = std::min(kStrip<T>, cols - s);
          uint8_t open[kTileRows / kGroup] = {};
          T* to = c + row * n + col + s;
          SAPWOOD_ISA_CALL(finish_strip(sums + s, shifts.alpha + row, shifts.beta + col + s, least,
                                        rows, count, to, n, open));
          exact_strip<T>(a, b, k, row, rows, col + s, count, open, scratch, to, n);
        }
      });
}

template <class T>
void log_matmul_element(const Matrix<T>& a, const Matrix<T>& b, int64_t m, int64_t n, int64_t k,
                        bool exact, T* c) {
  if (m > n && n < kStrip<T> / 2) {  // columns are the vector lanes: let the longer side be them
    std::vector<T> turned(static_cast<size_t>(m * n));
    log_matmul_element<T>(b.transposed(), a.transposed(), n, m, k, exact, turned.data());
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c[i * n + j] = turned[static_cast<size_t>(j * m + i)];
    }
    return;
  }
  if (exact || m * n * k <= kSmall) return exact_matmul(a, b, m, n, k, c);
  certified_matmul(a, b, m, n, k, c);
}

inline Tensor log_matmul(const Tensor& a, const Tensor& b, bool exact) {
  const Sizes s = product_sizes("log_matmul", a, b);
  const Tensor left = as_compute(a), right = as_compute(b);
  const Tensor c = new_tensor(left, {s.batch, s.m, s.n});
  if (s.m == 0 || s.n == 0) return in_type(c, a.scalar_type());
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    T* out = mutable_data<T>(c);
    over_batch(s, [&](int64_t i) {
      log_matmul_element<T>(matrix<T>(left, i), matrix<T>(right, i), s.m, s.n, s.k, exact,
                            out + i * s.m * s.n);
    });
  });
  return in_type(c, a.scalar_type());
}

}  // namespace sapwood::logsemiring
