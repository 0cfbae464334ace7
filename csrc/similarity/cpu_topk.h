// The k best candidates of every query. Each query has a buffer of a few more than k entries; when it
// is full, the k-th best so far becomes the bound below which nothing is looked at. All that lies
// within the rounding error of a bound is kept and ranked in double at the end, so the result does
// not depend on the order of the tiles or on who computed them: x with itself needs half the tiles,
// each serving its rows and its columns.
#pragma once

#include <mutex>

#include "similarity/cpu_scan.h"

namespace sapwood::similarity {

// Buffers of `count` queries, the first of which is query `first`.
template <class T>
class Best {
 public:
  Best(const Problem<T>& p, int64_t first, int64_t count, int64_t k)
      : p_(p),
        first_(first),
        k_(k),
        capacity_(std::min(p.candidates().n, k + spare(p, k))),
        values_(count * capacity_),
        columns_(count * capacity_),
        used_(static_cast<size_t>(count), 0),
        bound_(static_cast<size_t>(count), -std::numeric_limits<T>::infinity()) {}

  int64_t capacity() const { return capacity_; }
  T bound(int64_t row) const { return bound_[static_cast<size_t>(row)]; }
  int64_t used(int64_t row) const { return used_[static_cast<size_t>(row)]; }
  T value(int64_t row, int64_t e) const { return values_.get()[row * capacity_ + e]; }
  int32_t column(int64_t row, int64_t e) const { return columns_.get()[row * capacity_ + e]; }

  // Starts anew, for other queries, from bounds that are known already.
  void reset(int64_t first, int64_t row, T bound) {
    first_ = first;
    used_[static_cast<size_t>(row)] = 0;
    bound_[static_cast<size_t>(row)] = bound;
  }

  // Values below bound - slack can be left out: the product that set the bound may be too large by
  // the error of the heaviest candidate, the value itself too small by that of its own.
  double slack(int64_t row, double other_weight) const {
    const double weight = p_.query_weight(first_ + row);
    return p_.tolerance()(weight, p_.largest_weight()) + p_.tolerance()(weight, other_weight);
  }

  struct Entry {
    double key, value;
    int32_t column;
    T product;
  };
  using Entries = std::vector<Entry>;

  // Queries may be served by several threads at a time, each with a scratch of its own.
  void push(int64_t row, int64_t column, T value, Entries& scratch) {
    int64_t& used = used_[static_cast<size_t>(row)];
    if (key(value) < limit(row)) return;
    if (used == capacity_) {
      compact(row, scratch);
      if (key(value) < limit(row)) return;
    }
    values_.get()[row * capacity_ + used] = value;
    columns_.get()[row * capacity_ + used] = static_cast<int32_t>(column);
    ++used;
  }

  // The entries of a query, best first, at most k; exact where the problem asks for it.
  void rank(int64_t row, Entries& ranked) const {
    load(row, p_.recheck, ranked);
    const auto kept = std::min(static_cast<int64_t>(ranked.size()), k_);
    std::partial_sort(ranked.begin(), ranked.begin() + kept, ranked.end(), better);
    ranked.resize(static_cast<size_t>(kept));
  }

 private:
  // The coarser the products, the more candidates lie too close to the k-th to be left out.
  static int64_t spare(const Problem<T>& p, int64_t k) {
    return p.bf16 ? 64 + 3 * k : std::max<int64_t>(16, k / 2);
  }

  static bool better(const Entry& a, const Entry& b) {
    return a.key != b.key ? a.key > b.key : a.column < b.column;
  }

  double key(T value) const { return p_.key(static_cast<double>(value)); }
  double limit(int64_t row) const {
    return static_cast<double>(bound(row)) - slack(row, p_.largest_weight());
  }

  void load(int64_t row, bool exactly, Entries& entries) const {
    entries.clear();
    for (int64_t e = 0; e < used(row); ++e) {
      const T product = value(row, e);
      const double v =
          exactly ? p_.exact(first_ + row, column(row, e)) : static_cast<double>(product);
      entries.push_back({p_.key(v), v, column(row, e), product});
    }
  }

  void store(int64_t row, double lowest, const Entries& entries) {
    int64_t& used = used_[static_cast<size_t>(row)];
    used = 0;
    for (const Entry& entry : entries) {
      if (entry.key < lowest) continue;
      values_.get()[row * capacity_ + used] = entry.product;
      columns_.get()[row * capacity_ + used] = entry.column;
      ++used;
    }
  }

  // Brings the k best to the front and raises the bound to the k-th.
  void raise_bound(int64_t row, Entries& entries) {
    std::nth_element(entries.begin(), entries.begin() + (k_ - 1), entries.end(), better);
    T& bound = bound_[static_cast<size_t>(row)];
    bound = std::max(bound, round_down<T>(entries[static_cast<size_t>(k_ - 1)].key));
  }

  // Makes room. Where too many entries are as good as the k-th, they are told apart exactly.
  void compact(int64_t row, Entries& scratch) {
    load(row, false, scratch);
    raise_bound(row, scratch);
    store(row, limit(row), scratch);
    if (used(row) <= k_ + (capacity_ - k_) / 2) return;
    load(row, p_.recheck, scratch);
    raise_bound(row, scratch);
    scratch.resize(static_cast<size_t>(k_));
    store(row, -std::numeric_limits<double>::infinity(), scratch);
  }

  const Problem<T>& p_;
  int64_t first_;
  const int64_t k_, capacity_;
  Scratch<T> values_;
  Scratch<int32_t> columns_;
  std::vector<int64_t> used_;
  std::vector<T> bound_;
};

template <class T>
class TopkSearch {
 public:
  TopkSearch(const Problem<T>& p, int64_t k, bool include_self)
      : p_(p),
        include_self_(include_self),
        k_(std::min(k, p.candidates().n)),
        group_(p.tile.columns),
        best_(p, 0, k_ > 0 ? p.queries.n : 0, std::max<int64_t>(1, k_)),
        locks_(static_cast<size_t>(p.queries.n / group_ + 1)) {}

  // values and indices (N, k), padded with -inf and -1.
  void run(int64_t k, T* values, int64_t* indices) {
    if (k_ > 0) search();
    constexpr int64_t kChunk = 64;
    const int64_t chunks = (p_.queries.n + kChunk - 1) / kChunk;
    parallel_dynamic(chunks, p_.workers(chunks), [&](int64_t, int64_t c) {
      Entries ranked;
      for (int64_t i = c * kChunk; i < std::min(p_.queries.n, (c + 1) * kChunk); ++i) {
        write(i, k, ranked, values + i * k, indices + i * k);
      }
    });
  }

 private:
  using Entries = typename Best<T>::Entries;

  void search() {
    const std::vector<Task> tasks = tasks_of(p_);
    const auto count = static_cast<int64_t>(tasks.size());
    const auto workers = static_cast<size_t>(p_.workers(count));
    std::vector<std::unique_ptr<Scanner<T>>> scanners(workers);
    std::vector<std::unique_ptr<Best<T>>> owned(workers);
    parallel_dynamic(count, p_.workers(count), [&](int64_t worker, int64_t t) {
      auto& scanner = scanners[static_cast<size_t>(worker)];
      auto& own = owned[static_cast<size_t>(worker)];
      if (!scanner) {
        scanner = std::make_unique<Scanner<T>>(p_);
        own = std::make_unique<Best<T>>(p_, 0, rows_per_strip(p_), k_);
      }
      run_task(*scanner, *own, tasks[static_cast<size_t>(t)]);
    });
  }

  struct Hit {
    int64_t row, column;
    T value;
  };

  void run_task(Scanner<T>& scanner, Best<T>& own, const Task& task) {
    scanner.load(task.strip);
    const int64_t first = scanner.first_row(), rows = scanner.row_count();
    const double heaviest = scanner.heaviest();
    for (int64_t r = 0; r < rows; ++r) {
      const std::lock_guard lock(lock_of(first + r));
      own.reset(first, r, best_.bound(first + r));
    }
    std::vector<Hit> for_columns;
    Entries scratch;
    for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
      const int64_t tiles = scanner.micro_tiles(panel);
      for (int64_t begin = 0, end = 0; begin < tiles; begin = end) {
        // Columns without a bound let everything through: a few rows first, which give them one.
        const bool bounded = set_limits(scanner, own, panel, heaviest);
        if (bounded && p_.beyond_reach(heaviest, panel, lowest_limit(scanner))) break;
        end = bounded ? tiles : std::min(tiles, begin + best_.capacity() / p_.tile.rows + 1);
        for_columns.clear();
        scanner.each_candidate(panel, begin, end, [&](int64_t r, int64_t i, int64_t j, T value) {
          if (p_.self && i == j && !include_self_) return;
          own.push(r, j, value, scratch);
          if (p_.self && i != j) for_columns.push_back({j, i, value});
        });
        if (for_columns.empty()) continue;
        const std::lock_guard lock(lock_of(panel * group_));
        for (const Hit& hit : for_columns) best_.push(hit.row, hit.column, hit.value, scratch);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const std::lock_guard lock(lock_of(first + r));
      for (int64_t e = 0; e < own.used(r); ++e) {
        best_.push(first + r, own.column(r, e), own.value(r, e), scratch);
      }
    }
  }

  // Whether all columns that ask have a bound.
  bool set_limits(Scanner<T>& scanner, const Best<T>& own, int64_t panel, double heaviest) {
    for (int64_t r = 0; r < scanner.row_count(); ++r) {
      const double limit = static_cast<double>(own.bound(r)) - own.slack(r, p_.panel_weight(panel));
      scanner.row_limit[static_cast<size_t>(r)] = round_down<T>(limit);
    }
    if (!p_.self) return true;
    const int64_t begin = panel * group_, columns = std::min(group_, p_.queries.n - begin);
    bool bounded = true;
    const std::lock_guard lock(lock_of(begin));
    for (int64_t c = 0; c < columns; ++c) {
      const double limit =
          static_cast<double>(best_.bound(begin + c)) - best_.slack(begin + c, heaviest);
      scanner.column_limit[static_cast<size_t>(c)] = round_down<T>(limit);
      bounded = bounded && limit > -std::numeric_limits<double>::infinity();
    }
    return bounded;
  }

  // Of all rows and, where columns ask, of all columns.
  double lowest_limit(const Scanner<T>& scanner) const {
    const auto end = scanner.row_limit.begin() + scanner.row_count();
    const T of_rows = *std::min_element(scanner.row_limit.begin(), end);
    const T of_columns =
        *std::min_element(scanner.column_limit.begin(), scanner.column_limit.end());
    return static_cast<double>(std::min(of_rows, of_columns));
  }

  std::mutex& lock_of(int64_t query) { return locks_[static_cast<size_t>(query / group_)]; }

  void write(int64_t i, int64_t k, Entries& ranked, T* values, int64_t* indices) const {
    ranked.clear();
    if (k_ > 0) best_.rank(i, ranked);
    for (int64_t e = 0; e < k; ++e) {
      const bool present = e < static_cast<int64_t>(ranked.size());
      const auto at = static_cast<size_t>(e);
      values[e] = present ? static_cast<T>(p_.unscaled(ranked[at].value))
                          : -std::numeric_limits<T>::infinity();
      indices[e] = present ? ranked[at].column : -1;
    }
  }

  const Problem<T>& p_;
  const bool include_self_;
  const int64_t k_;
  const int64_t group_;  // queries that share a lock: those of one panel
  Best<T> best_;
  std::vector<std::mutex> locks_;
};

}  // namespace sapwood::similarity
