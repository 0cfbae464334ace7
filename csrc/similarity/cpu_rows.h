// Tensors as the tile loop wants them: rows described in double, panels packed once and shared by all
// tasks, tolerances that bound the rounding error of a product.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "similarity/kernel.h"
#include "similarity/problem.h"

namespace sapwood::similarity {

// One side of a problem: the original rows and what normalises each.
template <class T>
struct Operand {
  const T* x;  // (n, k) contiguous
  int64_t n, k;
  std::vector<Row> rows;
  double scale = 1;  // common to all rows; a power of two, 1 for unit kinds
};

template <class T>
void describe(Operand<T>& operand, Kind kind, int64_t workers) {
  constexpr int64_t kChunk = 256;
  operand.rows.resize(static_cast<size_t>(operand.n));
  parallel_dynamic((operand.n + kChunk - 1) / kChunk, workers, [&](int64_t, int64_t chunk) {
    const int64_t last = std::min(operand.n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < last; ++i) {
      double squares = 0;
      SAPWOOD_ISA_CALL(describe_row(operand.x + i * operand.k, operand.k, kind, operand.scale,
                                    operand.rows[static_cast<size_t>(i)], squares));
    }
  });
}

// The factor that brings the largest finite entry near 1.
template <class T>
double common_scale(const T* x, int64_t n, int64_t k) {
  double peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    double own = 0;
    bool finite = true;
    SAPWOOD_ISA_CALL(row_peak(x + i * k, k, own, finite));
    peak = std::max(peak, own);
  }
  return scale_for(peak);
}

// Queries x (N, K) against candidates y (M, K); y is x itself for `self`.
template <class T>
class Problem {
 public:
  Problem(const Tensor& x, const std::optional<Tensor>& y, Kind kind, bool absolute, bool recheck,
          bool bf16 = false)
      : self(!y.has_value()),
        absolute(absolute),
        recheck(recheck),
        bf16(bf16 && sizeof(T) == 4 && kind != Kind::euclidean && has_bf16_tiles()),
        kind(kind),
        queries{data<T>(x), x.size(0), x.size(1), {}, 1.0},
        tile(tile_of<T>()),
        workers_(useful_workers(INT64_MAX, 2.0 * static_cast<double>(x.numel()) *
                                               static_cast<double>(y ? y->size(0) : x.size(0)))) {
    Operand<T> other{nullptr, 0, queries.k, {}, 1.0};
    if (y) other = {data<T>(*y), y->size(0), queries.k, {}, 1.0};
    if (!is_unit(kind)) {
      queries.scale = common_scale(queries.x, queries.n, queries.k);
      other.scale = y ? common_scale(other.x, other.n, other.k) : queries.scale;
      if (kind == Kind::euclidean) {
        if (y && other.n > 0) queries.scale = std::min(queries.scale, other.scale);
        other.scale = queries.scale;
      }
    }
    describe(queries, kind, workers_);
    if (y) describe(other, kind, workers_);
    own_candidates_ = std::move(other);
    unit_scale_ = queries.scale * candidates().scale;
    if (kind == Kind::euclidean) find_shift();
    tolerance_ = Tolerance::of<T>(kind, queries.k, recheck, this->bf16);
    measure_and_pack();
  }

  const bool self, absolute, recheck;
  const bool bf16;  // tiles hold pairs of bfloat16
  const Kind kind;
  Operand<T> queries;
  const Tile tile;

  const Operand<T>& candidates() const { return self ? queries : own_candidates_; }
  int64_t panel_count() const { return (candidates().n + tile.columns - 1) / tile.columns; }
  int64_t k() const { return queries.k; }
  int64_t depth() const { return bf16 ? (k() + 1) / 2 : k(); }  // words of a packed row
  int64_t workers(int64_t tasks) const { return std::min(workers_, std::max<int64_t>(1, tasks)); }
  const T* panel(int64_t p) const { return panels_->get() + p * tile.columns * depth(); }
  const T* column_offsets(int64_t p) const {
    return column_offset_.empty() ? nullptr : column_offset_.data() + p * tile.columns;
  }
  const Tolerance& tolerance() const { return tolerance_; }

  // Sizes that the tolerance of a pair is made of: norms for dot, squared norms for euclidean.
  double query_weight(int64_t i) const { return weight_of(query_weight_, i); }
  double column_weight(int64_t j) const {
    return weight_of(self ? query_weight_ : column_weight_, j);
  }
  // Whether no product of such a query with this panel reaches the limit (Cauchy-Schwarz).
  bool beyond_reach(double weight, int64_t p, double limit) const {
    if (kind != Kind::dot) return false;
    return weight * panel_weight(p) + tolerance_(weight, panel_weight(p)) < limit;
  }

  double panel_weight(int64_t p) const { return weight_of(panel_weight_, p); }
  double largest_weight() const { return largest_weight_; }

  // Thresholds and results carry the common scale inside.
  double scaled(double value) const { return value * unit_scale_; }
  double unscaled(double value) const { return value / unit_scale_; }
  double key(double value) const { return absolute ? std::abs(value) : value; }

  double exact(int64_t i, int64_t j) const {
    const Operand<T>& y = candidates();
    double result = 0;
    SAPWOOD_ISA_CALL(exact_similarity(
        queries.x + i * k(), y.x + j * k(), k(), queries.rows[static_cast<size_t>(i)],
        y.rows[static_cast<size_t>(j)], kind == Kind::euclidean, result));
    return result;
  }

  void normalized(const Operand<T>& operand, int64_t i, T* to) const {
    const double* shift = kind == Kind::euclidean ? shift_.data() : nullptr;
    SAPWOOD_ISA_CALL(
        normalize_row(operand.x + i * k(), to, k(), operand.rows[static_cast<size_t>(i)], shift));
  }

  // The row as tiles hold it, depth() words; returns its normalised entries, in `scratch` or `to`.
  const T* packable(const Operand<T>& operand, int64_t i, T* scratch, T* to) const {
    if constexpr (sizeof(T) == 4) {
      if (bf16) {
        normalized(operand, i, scratch);
        SAPWOOD_ISA_CALL(round_to_pairs(scratch, k(), to));
        return scratch;
      }
    }
    normalized(operand, i, to);
    return to;
  }

  // The squared norm of a shifted row; a row that is not finite is infinitely far from all.
  T query_offset(int64_t i) const {
    const bool finite = queries.rows[static_cast<size_t>(i)].finite;
    return finite ? static_cast<T>(query_weight(i)) : std::numeric_limits<T>::infinity();
  }

 private:
  static double weight_of(const std::vector<double>& weights, int64_t i) {
    return weights.empty() ? 1.0 : weights[static_cast<size_t>(i)];
  }

  // The mean of all finite rows, in blocks of rows whose sums are added in order.
  void find_shift() {
    shift_.assign(static_cast<size_t>(k()), 0.0);
    int64_t count = 0;
    for (const Operand<T>* operand : {&queries, self ? nullptr : &own_candidates_}) {
      for (int64_t i = 0; operand != nullptr && i < operand->n; ++i) {
        if (!operand->rows[static_cast<size_t>(i)].finite) continue;
        ++count;
        for (int64_t c = 0; c < k(); ++c) {
          shift_[static_cast<size_t>(c)] +=
              static_cast<double>(operand->x[i * k() + c]) * operand->scale;
        }
      }
    }
    for (double& s : shift_) s /= static_cast<double>(std::max<int64_t>(1, count));
  }

  double size_of(const T* row) const {
    double squares = 0;
    SAPWOOD_ISA_CALL(squared_norm(row, k(), squares));
    return kind == Kind::euclidean ? squares : std::sqrt(squares);
  }

  // Normalises the candidates into panels, and weighs the rows where tolerances depend on them.
  void measure_and_pack() {
    const Operand<T>& y = candidates();
    const int64_t width = tile.columns, panels = panel_count();
    const bool weighted = !is_unit(kind);
    panels_.emplace(panels * width * depth());
    std::vector<double>& column_weight = self ? query_weight_ : column_weight_;
    if (weighted) column_weight.assign(static_cast<size_t>(y.n), 0.0);
    if (weighted) panel_weight_.assign(static_cast<size_t>(panels), 0.0);
    if (kind == Kind::euclidean) {
      column_offset_.assign(static_cast<size_t>(panels * width), T(0));
    }
    parallel_dynamic(panels, workers(panels), [&](int64_t, int64_t p) {
      const int64_t first = p * width, count = std::min(width, y.n - first);
      const Scratch<T> rows(width * depth()), scratch(k());
      for (int64_t i = 0; i < count; ++i) {
        const T* row = packable(y, first + i, scratch.get(), rows.get() + i * depth());
        if (!weighted) continue;
        const double size = size_of(row);
        column_weight[static_cast<size_t>(first + i)] = size;
        panel_weight_[static_cast<size_t>(p)] =
            std::max(panel_weight_[static_cast<size_t>(p)], size);
        if (kind != Kind::euclidean) continue;
        column_offset_[static_cast<size_t>(first + i)] =
            y.rows[static_cast<size_t>(first + i)].finite ? static_cast<T>(size)
                                                          : std::numeric_limits<T>::infinity();
      }
      SAPWOOD_ISA_CALL(
          pack_panel(rows.get(), count, depth(), width, panels_->get() + p * width * depth()));
    });
    if (weighted && !self) weigh_queries();
    largest_weight_ = weighted ? 0.0 : 1.0;
    for (const double w : panel_weight_) largest_weight_ = std::max(largest_weight_, w);
  }

  void weigh_queries() {
    query_weight_.assign(static_cast<size_t>(queries.n), 0.0);
    const Scratch<T> row(k());
    for (int64_t i = 0; i < queries.n; ++i) {
      normalized(queries, i, row.get());
      query_weight_[static_cast<size_t>(i)] = size_of(row.get());
    }
  }

  int64_t workers_;
  Operand<T> own_candidates_{};
  double unit_scale_ = 1;
  Tolerance tolerance_;
  std::vector<double> shift_;
  std::vector<double> query_weight_, column_weight_, panel_weight_;
  std::vector<T> column_offset_;
  double largest_weight_ = 1;
  std::optional<Scratch<T>> panels_;
};

}  // namespace sapwood::similarity
