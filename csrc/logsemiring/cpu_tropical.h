// max_matmul and sample_matmul.
#pragma once

#include <tuple>
#include <type_traits>

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

// Room for one pass of packed terms. A pitch that is a power of two would put all rows in one set of
// the cache.
template <class T>
class TropicalScratch {
 public:
  using Place = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

  explicit TropicalScratch(int64_t k)
      : pitch(round_up(std::min(std::max<int64_t>(k, 1), kExactDepth), kBlock) + kBlock),
        memory_(pitch * (kGroup + 2 * kStrip<T>)) {}
  T* a() { return memory_.get(); }
  T* b() { return a() + pitch * kGroup; }
  T* b_turned() { return b() + pitch * kStrip<T>; }

  const int64_t pitch;
  bool b_ready = false;  // b is that of this strip, all terms of it

 private:
  Scratch<T> memory_;
};

template <class T>
void max_matmul_tile(const Matrix<T>& a, const Matrix<T>& b, int64_t k, int64_t row, int64_t rows,
                     int64_t col, int64_t cols, bool careful, TropicalScratch<T>& scratch,
                     T* values, int64_t* indices, int64_t pitch) {
  constexpr int64_t S = kStrip<T>;
  alignas(64) T top[kGroup * S];
  alignas(64) typename TropicalScratch<T>::Place block[kGroup * S];
  int64_t index[kGroup * S];
  std::fill_n(top, kGroup * S, -kInf<T>);
  std::fill_n(index, kGroup * S, int64_t{-1});
  T *pa = scratch.a(), *pb = scratch.b();
  for (int64_t l = 0; l < k; l += kExactDepth) {
    const int64_t depth = std::min(kExactDepth, k - l), whole = round_up(depth, kBlock);
    std::fill_n(block, kGroup * S, -1);
    SAPWOOD_ISA_CALL(copy_rows(a, row, rows, l, depth, whole, scratch.pitch, pa));
    if (!scratch.b_ready) {
      SAPWOOD_ISA_CALL(pack_cols(b, col, cols, l, depth, pb));
      std::fill_n(pb + depth * S, (whole - depth) * S, -kInf<T>);
      SAPWOOD_ISA_CALL(turn_panel(pb, S, whole, scratch.pitch, scratch.b_turned()));
      scratch.b_ready = k <= kExactDepth;
    }
    SAPWOOD_ISA_CALL(arg_maxima(pa, scratch.pitch, pb, whole, rows, cols, top, block));
    SAPWOOD_ISA_CALL(
        locate(pa, scratch.b_turned(), scratch.pitch, l, rows, cols, top, block, index));
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(top + r * S, cols, values + r * pitch);
    std::copy_n(index + r * S, cols, indices + r * pitch);
    for (int64_t j = 0; careful && j < cols; ++j) {
      nan_wins(a, b, k, row + r, col + j, values + r * pitch + j, indices + r * pitch + j);
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
    TropicalScratch<T> scratch(s.k);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t % groups * kGroup, col = t / groups * kStrip<T>;
      scratch.b_ready = scratch.b_ready && row > 0;
      max_matmul_tile<T>(a, b, s.k, row, std::min(kGroup, s.m - row), col,
                         std::min(kStrip<T>, s.n - col), in_a || in_b, scratch,
                         values + row * s.n + col, indices + row * s.n + col, s.n);
    }
  });
}

inline std::tuple<Tensor, Tensor> max_matmul(const Tensor& a, const Tensor& b) {
  const Sizes s = product_sizes("max_matmul", a, b);
  const Tensor left = as_compute(a), right = as_compute(b);
  const Tensor values = new_tensor(left, {s.batch, s.m, s.n});
  const Tensor indices = new_tensor(left, {s.batch, s.m, s.n}, ScalarType::Long);
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    over_batch(s, [&](int64_t i) {
      const int64_t at = i * s.m * s.n;
      max_matmul_element<T>(matrix<T>(left, i), matrix<T>(right, i), s,
                            mutable_data<T>(values) + at, mutable_data<int64_t>(indices) + at);
    });
  });
  return {in_type(values, a.scalar_type()), indices};
}

inline Tensor sample_matmul(const Tensor& a, const Tensor& b, int64_t num_samples, int64_t seed) {
  const Sizes s = product_sizes("sample_matmul", a, b);
  const Tensor left = as_compute(a), right = as_compute(b);
  const Tensor out = new_tensor(left, {num_samples, s.batch, s.m, s.n}, ScalarType::Long);
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
