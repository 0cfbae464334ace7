// max_matmul and sample_matmul.
#pragma once

#include <tuple>

#include "logsemiring/cpu_gemm.h"

namespace sapwood::logsemiring {

// The NaN term with the lowest index, if there is one: NaN wins over every maximum.
template <class T>
void nan_wins(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t i, int64_t j, T* value,
              int64_t* index) {
  for (int64_t l = 0; l < k; ++l) {
    const T x = a.at(i, l) + b.at(l, j);
    if (x == x) continue;
    *value = x;
    *index = l;
    return;
  }
}

template <class T>
void max_matmul_tile(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row, int64_t rows,
                     int64_t col, int64_t cols, bool careful, bool pb_ready,
                     ExactScratch<T>& scratch, T* values, int64_t* indices, int64_t pitch) {
  T top[kGroup * kStrip<T>];
  int64_t index[kGroup * kStrip<T>];
  std::fill_n(top, kGroup * kStrip<T>, -kInf<T>);
  std::fill_n(index, kGroup * kStrip<T>, int64_t{-1});
  T *pa = scratch.a(), *pb = scratch.b();
  for (int64_t l = 0; l < k; l += kExactDepth) {
    const int64_t depth = std::min(kExactDepth, k - l);
    SAPWOOD_ISA_CALL(pack_rows(a, row, rows, l, depth, pa));
    if (!pb_ready || k > kExactDepth) {
      SAPWOOD_ISA_CALL(pack_cols(b, col, cols, l, depth, pb));
    }
    SAPWOOD_ISA_CALL(arg_maxima(pa, pb, depth, l, rows, cols, top, index));
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < cols; ++j) {
      T* value = values + r * pitch + j;
      int64_t* at = indices + r * pitch + j;
      *value = top[r * kStrip<T> + j];
      *at = index[r * kStrip<T> + j];
      if (careful) nan_wins(a, b, k, row + r, col + j, value, at);
    }
  }
}

template <class T>
void max_matmul_element(const Matrix<T>& a, const Matrix<T>& b, const Sizes& s, T* values,
                        int64_t* indices) {
  bool in_a = false, in_b = false;
  SAPWOOD_ISA_CALL(may_be_nan(a, s.m, s.k, &in_a));
  SAPWOOD_ISA_CALL(may_be_nan(b, s.k, s.n, &in_b));
  const int64_t strips = round_up(s.n, kStrip<T>) / kStrip<T>,
                groups = round_up(s.m, kGroup) / kGroup;
  const int64_t per_tile = kGroup * kStrip<T> * std::max<int64_t>(s.k, 1);
  const int64_t grain = std::max<int64_t>(1, 8 * kTermsPerTask / per_tile);
  parallel_range(strips * groups, grain, [&](int64_t begin, int64_t end) {
    ExactScratch<T> scratch(s.k);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t % groups * kGroup, col = t / groups * kStrip<T>;
      max_matmul_tile<T>(a, b, s.k, row, std::min(kGroup, s.m - row), col,
                         std::min(kStrip<T>, s.n - col), in_a || in_b, t > begin && row > 0,
                         scratch, values + row * s.n + col, indices + row * s.n + col, s.n);
    }
  });
}

inline std::tuple<Tensor, Tensor> max_matmul(const Tensor& a, const Tensor& b) {
  const Sizes s = product_sizes("max_matmul", a, b);
  const Tensor left = as_compute(a), right = as_compute(b);
  const Tensor values = torch::stable::new_empty(left, {s.batch, s.m, s.n});
  const Tensor indices = torch::stable::new_empty(left, {s.batch, s.m, s.n}, ScalarType::Long);
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    over_batch(s, [&](int64_t i) {
      const int64_t at = i * s.m * s.n;
      max_matmul_element<T>(matrix<T>(left, i), matrix<T>(right, i), s,
                            mutable_data<T>(values) + at, mutable_data<int64_t>(indices) + at);
    });
  });
  return {back_to(values, a.scalar_type()), indices};
}

inline Tensor sample_matmul(const Tensor& a, const Tensor& b, int64_t num_samples, int64_t seed) {
  const Sizes s = product_sizes("sample_matmul", a, b);
  const Tensor left = as_compute(a), right = as_compute(b);
  const Tensor out =
      torch::stable::new_empty(left, {num_samples, s.batch, s.m, s.n}, ScalarType::Long);
  const int64_t rows = num_samples * s.batch * s.m;
  const int64_t grain = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, s.n * s.k));
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    int64_t* to = mutable_data<int64_t>(out);
    parallel_range(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t flat = row / s.m, i = row % s.m;
        const Matrix<T> x = matrix<T>(left, flat % s.batch), y = matrix<T>(right, flat % s.batch);
        SAPWOOD_ISA_CALL(draw_row(x, y, i, s.n, s.k, static_cast<uint64_t>(seed),
                                  static_cast<uint32_t>(flat), to + row * s.n));
      }
    });
  });
  return out;
}

}  // namespace sapwood::logsemiring
