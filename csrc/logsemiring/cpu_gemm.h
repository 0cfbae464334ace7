// The packed product on torch's threads. Which tile a task computes does not depend on their number.
#pragma once

#include "logsemiring/cpu_tensors.h"

namespace sapwood::logsemiring {

inline constexpr int64_t kPanelBytes = int64_t{32} << 20;  // of one packed operand at a time

// epilogue(row0, rows, col0, cols, sums) for every tile of left right; sums (kTileRows, kTileCols).
template <class T, class Epilogue>
void packed_product(const Operand<T>& left, const Operand<T>& right, int64_t m, int64_t n,
                    int64_t k, bool keep_nan, const Epilogue& epilogue) {
  constexpr int64_t R = kTileRows, C = kTileCols<T>, S = kStrip<T>;
  const int64_t affordable = kPanelBytes / (std::max<int64_t>(k, 1) * int64_t{sizeof(T)});
  const int64_t row_block = std::min(round_up(m, R), std::max(R, affordable / R * R));
  const int64_t col_block = std::min(round_up(n, C), std::max(C, affordable / C * C));
  Scratch<T> left_panels(row_block * k), right_panels(std::min(col_block, round_up(n, S)) * k);
  T *packed_left = left_panels.get(), *packed_right = right_panels.get();
  const int64_t grain = std::max<int64_t>(1, 16384 / (S * std::max<int64_t>(k, 1)));
  for (int64_t j0 = 0; j0 < n; j0 += col_block) {
    const int64_t cols = std::min(col_block, n - j0), strips = round_up(cols, S) / S;
    parallel_range(strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        SAPWOOD_ISA_CALL(pack_right(right, keep_nan, j0 + s * S, std::min(S, cols - s * S), k,
                                    packed_right + s * S * k));
      }
    });
    for (int64_t i0 = 0; i0 < m; i0 += row_block) {
      const int64_t rows = std::min(row_block, m - i0), panels = round_up(rows, kRows) / kRows;
      parallel_range(panels, 3 * grain, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          SAPWOOD_ISA_CALL(pack_left(left, keep_nan, i0 + p * kRows,
                                     std::min(kRows, rows - p * kRows), k,
                                     packed_left + p * kRows * k));
        }
      });
      const int64_t tall = round_up(rows, R) / R, wide = round_up(cols, C) / C;
      parallel_range(tall * wide, 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals scope;
        alignas(64) T sums[R * C];
        for (int64_t t = begin; t < end; ++t) {
          const int64_t row = t % tall * R, col = t / tall * C;
          const int64_t tile_rows = std::min(R, rows - row), tile_cols = std::min(C, cols - col);
          SAPWOOD_ISA_CALL(tile_product(packed_left + row * k, packed_right + col * k, k,
                                        round_up(tile_rows, kRows) / kRows,
                                        round_up(tile_cols, S) / S, sums));
          epilogue(i0 + row, tile_rows, j0 + col, tile_cols, sums);
        }
      });
    }
  }
}

// The maxima of the rows of a and of the columns of b, and what is subtracted before exp: 0 for
// -inf, so that an empty row gives zeros and not NaN. All are readable beyond their
// ends up to a full strip.
template <class T>
class Shifts {
 public:
  Shifts(const Matrix<T>& a, const Matrix<T>& b, int64_t m, int64_t n, int64_t k)
      : values_(static_cast<size_t>(2 * (m + n) + 4 * kStrip<T>)),
        alpha(values_.data()),
        beta(alpha + m + kStrip<T>),
        row_shift(beta + n + kStrip<T>),
        col_shift(row_shift + m + kStrip<T>) {
    fill(a, m, k, alpha, row_shift);
    fill(b.transposed(), n, k, beta, col_shift);
  }

 private:
  std::vector<T> values_;

  static void fill(const Matrix<T>& x, int64_t lanes, int64_t k, T* top, T* shift) {
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(k, 1));
    parallel_range(lanes, round_up(grain, 64), [&](int64_t begin, int64_t end) {
      const Matrix<T> part{x.data + begin * x.row_stride, x.row_stride, x.col_stride};
      SAPWOOD_ISA_CALL(row_maxima(part, end - begin, k, top + begin));
      for (int64_t i = begin; i < end; ++i) shift[i] = top[i] == -kInf<T> ? T(0) : top[i];
    });
  }

 public:
  T *alpha, *beta, *row_shift, *col_shift;
};

// Scratch of the exact kernel for one task.
template <class T>
class ExactScratch {
 public:
  explicit ExactScratch(int64_t k)
      : depth_(std::min(std::max<int64_t>(k, 1), kExactDepth)),
        memory_(2 * depth_ * (kGroup + kStrip<T>)) {}
  T* a() { return memory_.get(); }
  T* b() { return a() + depth_ * kGroup; }
  T* h() { return b() + depth_ * kStrip<T>; }
  T* g() { return h() + depth_ * kGroup; }

 private:
  int64_t depth_;
  Scratch<T> memory_;
};

}  // namespace sapwood::logsemiring
