// The walk over tiles: strips of query rows against panels of candidates, and the decision about what
// the tiles propose.
#pragma once

#include <vector>

#include "similarity/cpu_rows.h"

namespace sapwood::similarity {

// Some panels against one strip of query rows. Tasks ascend by strip, then by panel.
struct Task {
  int64_t strip, first_panel, last_panel;
};

template <class T>
int64_t rows_per_strip(const Problem<T>& p) {
  return strip_rows(p.tile, p.depth(), sizeof(T));
}

// For x with itself a strip begins at the panel of its own diagonal. Few long tasks keep the strip
// in L2; they are cut so that a few query rows still occupy all threads.
template <class T>
std::vector<Task> tasks_of(const Problem<T>& p) {
  constexpr int64_t kLeastPanels = 128;
  const int64_t rows = rows_per_strip(p), panels = p.panel_count();
  const int64_t length = std::max(kLeastPanels, (panels + 7) / 8);
  std::vector<Task> tasks;
  for (int64_t s = 0; s * rows < p.queries.n; ++s) {
    for (int64_t j = p.self ? s * rows / p.tile.columns : 0; j < panels; j += length) {
      tasks.push_back({s, j, std::min(panels, j + length)});
    }
  }
  return tasks;
}

// One worker's packed strip and its candidates. Limits are set by the caller.
template <class T>
class Scanner {
 public:
  explicit Scanner(const Problem<T>& p)
      : p_(p),
        capacity_(rows_per_strip(p)),
        packed_(capacity_ * p.depth()),
        rows_(p.tile.rows * p.depth()),
        scratch_(p.k()),
        found_(kMaxCandidates),
        row_offset_(static_cast<size_t>(capacity_), T(0)),
        row_limit(static_cast<size_t>(capacity_), kNever),
        column_limit(static_cast<size_t>(p.tile.columns), kNever) {}

  // Packs the query rows of a strip, unless they are packed already.
  void load(int64_t strip) {
    if (strip == strip_) return;
    strip_ = strip;
    first_ = strip * capacity_;
    count_ = std::min(capacity_, p_.queries.n - first_);
    std::fill(row_limit.begin(), row_limit.end(), kNever);
    for (int64_t m = 0; m * p_.tile.rows < count_; ++m) {
      const int64_t begin = m * p_.tile.rows, rows = std::min(p_.tile.rows, count_ - begin);
      for (int64_t r = 0; r < rows; ++r) {
        p_.packable(p_.queries, first_ + begin + r, scratch_.get(), rows_.get() + r * p_.depth());
      }
      SAPWOOD_ISA_CALL(pack_panel(rows_.get(), rows, p_.depth(), p_.tile.rows,
                                  packed_.get() + begin * p_.depth()));
    }
    heaviest_ = 0;
    for (int64_t r = 0; r < count_; ++r) {
      heaviest_ = std::max(heaviest_, p_.query_weight(first_ + r));
    }
    for (int64_t r = 0; p_.kind == Kind::euclidean && r < count_; ++r) {
      row_offset_[static_cast<size_t>(r)] = p_.query_offset(first_ + r);
    }
  }

  int64_t first_row() const { return first_; }
  int64_t row_count() const { return count_; }
  double heaviest() const { return heaviest_; }  // query of the strip

  // Register tiles that a panel concerns: of x with itself those not below the diagonal.
  int64_t micro_tiles(int64_t panel) const {
    const int64_t micro = (count_ + p_.tile.rows - 1) / p_.tile.rows;
    const int64_t end = std::min(p_.candidates().n, (panel + 1) * p_.tile.columns);
    return p_.self ? std::min(micro, (end - 1 - first_) / p_.tile.rows + 1) : micro;
  }

  template <class F>
  void each_candidate(int64_t panel, const F& f) {
    each_candidate(panel, 0, micro_tiles(panel), f);
  }

  // f(row of the strip, i, j, value) for what reaches a limit; of x with itself the pairs i <= j.
  template <class F>
  void each_candidate(int64_t panel, int64_t begin, int64_t end, const F& f) {
    const int64_t first = panel * p_.tile.columns, skipped = begin * p_.tile.rows;
    const int64_t columns = std::min(p_.tile.columns, p_.candidates().n - first);
    const Strip<T> strip{packed_.get() + skipped * p_.depth(),
                         end - begin,
                         p_.panel(panel),
                         p_.depth(),
                         row_limit.data() + skipped,
                         column_limit.data(),
                         row_offset_.data() + skipped,
                         p_.column_offsets(panel),
                         p_.kind == Kind::euclidean,
                         p_.absolute};
    const int64_t count = propose_all(strip);
    for (int64_t c = 0; c < count; ++c) {
      const Candidate<T>& hit = found_.get()[c];
      const int64_t row = skipped + hit.row, i = first_ + row, j = first + hit.column;
      if (row >= count_ || hit.column >= columns || (p_.self && j < i)) continue;
      f(row, i, j, hit.value);
    }
  }

 private:
  int64_t propose_all(const Strip<T>& strip) {
    int64_t count = 0;
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
      if (p_.bf16) {
        isa_avx512_bf16::propose(strip, found_.get(), count);
        return count;
      }
    }
#endif
    SAPWOOD_ISA_CALL(propose(strip, found_.get(), count));
    return count;
  }

  static constexpr T kNever = std::numeric_limits<T>::infinity();

  const Problem<T>& p_;
  int64_t strip_ = -1, first_ = 0, count_ = 0, capacity_;
  double heaviest_ = 0;
  Scratch<T> packed_, rows_, scratch_;
  Scratch<Candidate<T>> found_;
  std::vector<T> row_offset_;

 public:
  std::vector<T> row_limit, column_limit;
};

// Whether pairs reach a threshold, with what is too close to tell decided in double.
template <class T>
class Decision {
 public:
  Decision(const Problem<T>& p, double threshold) : p_(p), threshold_(p.scaled(threshold)) {}

  // What a product must reach to be looked at: rows of a strip against the rows of a panel.
  void set_limits(Scanner<T>& scanner, int64_t panel) const {
    for (int64_t r = 0; r < scanner.row_count(); ++r) {
      const double weight = p_.query_weight(scanner.first_row() + r);
      const double slack = p_.tolerance()(weight, p_.panel_weight(panel));
      scanner.row_limit[static_cast<size_t>(r)] = round_down<T>(threshold_ - slack);
    }
  }

  // Whether a panel cannot hold a pair with the rows of the strip.
  bool out_of_reach(const Scanner<T>& scanner, int64_t panel) const {
    const double slack = p_.tolerance()(scanner.heaviest(), p_.panel_weight(panel));
    return p_.beyond_reach(scanner.heaviest(), panel, threshold_ - slack);
  }

  // Limits of unit rows are the same for every panel.
  bool one_limit() const { return is_unit(p_.kind); }

  // Replaces the value by the exact one where that decides, or where a distance cancels.
  bool accepts(int64_t i, int64_t j, T& value) const {
    double exact = static_cast<double>(value);
    if (p_.recheck) {
      const double slack = p_.tolerance()(p_.query_weight(i), p_.column_weight(j));
      const bool cancels = p_.kind == Kind::euclidean && -exact < kCancelled * slack;
      // Products of bfloat16 only propose; their values are too coarse to be reported.
      if (p_.bf16 || cancels || std::abs(p_.key(exact) - threshold_) <= slack)
        exact = p_.exact(i, j);
    }
    value = static_cast<T>(p_.unscaled(exact));
    return p_.key(exact) >= threshold_;
  }

 private:
  // A distance so small beside the norms that subtraction left less than four digits.
  static constexpr double kCancelled = 256;

  const Problem<T>& p_;
  const double threshold_;
};

}  // namespace sapwood::similarity
