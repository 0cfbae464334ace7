// Pairs that reach a threshold, sorted by row and column, in one pass: every task collects its own,
// grouped by row; when all are done they are copied into place.
#pragma once

#include <mutex>
#include <tuple>

#include "similarity/cpu_scan.h"

namespace sapwood::similarity {

// Pairs of one task. While it runs they lie in the order of panels; `sort` groups them by row.
template <class T>
class TaskPairs {
 public:
  void add(int64_t row, int64_t column, T value) {
    rows_.push_back(static_cast<uint8_t>(row));
    columns_.push_back(static_cast<int32_t>(column));
    values_.push_back(value);
  }

  int64_t size() const { return static_cast<int64_t>(columns_.size()); }

  // Pairs of row r are [begin(r), begin(r + 1)) after sort().
  int64_t begin(int64_t r) const { return begin_[static_cast<size_t>(r)]; }
  const int32_t* columns() const { return columns_.data(); }
  const T* values() const { return values_.data(); }

  // A stable counting sort by row keeps the columns ascending. Keeps at most `limit` pairs, the
  // first ones; the new arrays have no spare room.
  void sort(int64_t limit) {
    begin_.assign(kStripRows + 1, 0);
    for (const uint8_t row : rows_) ++begin_[row + 1u];
    for (int64_t r = 0; r < kStripRows; ++r) begin_[r + 1u] += begin_[static_cast<size_t>(r)];
    const int64_t kept = std::min(limit, size());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    std::vector<int32_t> columns(static_cast<size_t>(kept));
    std::vector<T> values(static_cast<size_t>(kept));
    std::vector<uint8_t> rows(static_cast<size_t>(kept));
    for (size_t e = 0; e < rows_.size(); ++e) {
      const int64_t to = next[rows_[e]]++;
      if (to >= kept) continue;
      columns[static_cast<size_t>(to)] = columns_[e];
      values[static_cast<size_t>(to)] = values_[e];
      rows[static_cast<size_t>(to)] = rows_[e];
    }
    columns_.swap(columns);
    values_.swap(values);
    rows_.swap(rows);
    for (int64_t& b : begin_) b = std::min(b, kept);
  }

  void finish(int64_t limit) {
    sort(limit);
    std::vector<uint8_t>().swap(rows_);
  }

  void clear() {
    std::vector<int32_t>().swap(columns_);
    std::vector<T>().swap(values_);
  }

 private:
  std::vector<uint8_t> rows_;  // of the strip
  std::vector<int32_t> columns_;
  std::vector<T> values_;
  std::vector<int64_t> begin_;
};

static_assert(kStripRows <= 256, "rows of a strip are stored as bytes");

// Tasks are handed out in order, so once the finished strips at the front hold more than max_pairs
// pairs, no later strip can matter.
class Progress {
 public:
  Progress(const std::vector<Task>& tasks, int64_t max_pairs)
      : tasks_(tasks), counts_(tasks.size(), -1), max_pairs_(max_pairs) {}

  bool needed(int64_t task) {
    const std::lock_guard lock(mutex_);
    return max_pairs_ < 0 || done_ <= max_pairs_ ||
           tasks_[static_cast<size_t>(task)].strip < strip_;
  }

  void finished(int64_t task, int64_t count) {
    const std::lock_guard lock(mutex_);
    counts_[static_cast<size_t>(task)] = count;
    for (; front_ < tasks_.size() && counts_[front_] >= 0; ++front_) {
      running_ += counts_[front_];
      if (front_ + 1 < tasks_.size() && tasks_[front_ + 1].strip == strip_) continue;
      done_ = running_;
      ++strip_;
    }
  }

 private:
  std::mutex mutex_;
  const std::vector<Task>& tasks_;
  std::vector<int64_t> counts_;
  const int64_t max_pairs_;
  size_t front_ = 0;
  int64_t running_ = 0, done_ = 0;  // pairs of the finished tasks at the front, of whole strips
  int64_t strip_ = 0;               // the first strip that is not finished
};

template <class T>
class PairSearch {
 public:
  PairSearch(const Problem<T>& p, double threshold, bool include_self, int64_t max_pairs)
      : p_(p), decision_(p, threshold), include_self_(include_self), max_pairs_(max_pairs) {}

  void run() {
    tasks_ = tasks_of(p_);
    pairs_.resize(tasks_.size());
    const auto count = static_cast<int64_t>(tasks_.size());
    std::vector<std::unique_ptr<Scanner<T>>> scanners(static_cast<size_t>(p_.workers(count)));
    Progress progress(tasks_, max_pairs_);
    parallel_dynamic(count, p_.workers(count), [&](int64_t worker, int64_t t) {
      if (!progress.needed(t)) return;
      auto& scanner = scanners[static_cast<size_t>(worker)];
      if (!scanner) scanner = std::make_unique<Scanner<T>>(p_);
      progress.finished(t, collect(*scanner, t));
    });
    for (const TaskPairs<T>& found : pairs_) total_ += found.size();
  }

  bool truncated() const { return max_pairs_ >= 0 && total_ > max_pairs_; }
  int64_t size() const { return truncated() ? max_pairs_ : total_; }

  // row, col and value have size() entries.
  void copy(int64_t* row, int64_t* col, T* value) {
    struct Run {
      size_t first, last;  // tasks of one strip
      int64_t at;          // where its pairs go
    };
    std::vector<Run> runs;
    int64_t at = 0;
    for (size_t t = 0; t < tasks_.size(); ++t) {
      if (t == 0 || tasks_[t].strip != tasks_[t - 1].strip) runs.push_back({t, t, at});
      runs.back().last = t + 1;
      at += pairs_[t].size();
    }
    const auto strips = static_cast<int64_t>(runs.size());
    parallel_dynamic(strips, p_.workers(strips), [&](int64_t, int64_t s) {
      const Run& run = runs[static_cast<size_t>(s)];
      copy_strip(run.first, run.last, run.at, row, col, value);
    });
  }

 private:
  // More than max_pairs of one task are never needed: one more tells that some are missing.
  int64_t limit() const { return max_pairs_ < 0 ? INT64_MAX : max_pairs_ + 1; }

  int64_t collect(Scanner<T>& scanner, int64_t t) {
    const Task& task = tasks_[static_cast<size_t>(t)];
    TaskPairs<T>& found = pairs_[static_cast<size_t>(t)];
    const int64_t room = max_pairs_ < 0 ? INT64_MAX : 2 * max_pairs_ + 4096;
    scanner.load(task.strip);
    decision_.set_limits(scanner, task.first_panel);
    for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
      if (decision_.out_of_reach(scanner, panel)) continue;
      if (!decision_.one_limit()) decision_.set_limits(scanner, panel);
      scanner.each_candidate(panel, [&](int64_t r, int64_t i, int64_t j, T value) {
        if (p_.self && i == j && !include_self_) return;
        if (decision_.accepts(i, j, value)) found.add(r, j, value);
      });
      if (found.size() > room) found.sort(limit());
    }
    found.finish(limit());
    return found.size();
  }

  void copy_strip(size_t first, size_t last, int64_t at, int64_t* row, int64_t* col, T* value) {
    const int64_t begin = tasks_[first].strip * rows_per_strip(p_), count = size();
    for (int64_t r = 0; r < kStripRows; ++r) {
      for (size_t t = first; t < last; ++t) {
        const TaskPairs<T>& found = pairs_[t];
        if (found.size() == 0) continue;
        const int64_t end = std::min(found.begin(r + 1), found.begin(r) + count - at);
        for (int64_t e = found.begin(r); e < end; ++e, ++at) {
          row[at] = begin + r;
          col[at] = found.columns()[e];
          value[at] = found.values()[e];
        }
      }
    }
    for (size_t t = first; t < last; ++t) pairs_[t].clear();
  }

  const Problem<T>& p_;
  const Decision<T> decision_;
  const bool include_self_;
  const int64_t max_pairs_;
  std::vector<Task> tasks_;
  std::vector<TaskPairs<T>> pairs_;
  int64_t total_ = 0;
};

}  // namespace sapwood::similarity
