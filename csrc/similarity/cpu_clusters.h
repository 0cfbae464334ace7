// Connected components of the pairs that reach a threshold, without keeping a pair: every worker
// joins what it finds in a forest of its own, and the forests are joined at the end. The smallest
// member is the root of its set, so the result does not depend on the order of the unions.
#pragma once

#include <numeric>

#include "similarity/cpu_scan.h"

namespace sapwood::similarity {

class Forest {
 public:
  explicit Forest(int64_t n) : parent_(static_cast<size_t>(n)) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }

  int32_t find(int32_t i) {
    while (at(i) != i) {
      at(i) = at(at(i));  // halves the path
      i = at(i);
    }
    return i;
  }

  void join(int32_t i, int32_t j) {
    const int32_t a = find(i), b = find(j);
    at(std::max(a, b)) = std::min(a, b);
  }

 private:
  int32_t& at(int32_t i) { return parent_[static_cast<size_t>(i)]; }

  std::vector<int32_t> parent_;
};

// labels (N,): components numbered by their first members.
template <class T>
void find_clusters(const Problem<T>& p, double threshold, int64_t* labels) {
  const Decision<T> decision(p, threshold);
  const std::vector<Task> tasks = tasks_of(p);
  const auto count = static_cast<int64_t>(tasks.size());
  const auto workers = static_cast<size_t>(p.workers(count));
  const int64_t n = p.queries.n;
  std::vector<std::unique_ptr<Scanner<T>>> scanners(workers);
  std::vector<std::unique_ptr<Forest>> forests(workers);
  parallel_dynamic(count, p.workers(count), [&](int64_t worker, int64_t t) {
    auto& scanner = scanners[static_cast<size_t>(worker)];
    auto& forest = forests[static_cast<size_t>(worker)];
    if (!scanner) {
      scanner = std::make_unique<Scanner<T>>(p);
      forest = std::make_unique<Forest>(n);
    }
    const Task& task = tasks[static_cast<size_t>(t)];
    scanner->load(task.strip);
    decision.set_limits(*scanner, task.first_panel);
    for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
      if (decision.out_of_reach(*scanner, panel)) continue;
      if (!decision.one_limit()) decision.set_limits(*scanner, panel);
      scanner->each_candidate(panel, [&](int64_t, int64_t i, int64_t j, T value) {
        const auto a = static_cast<int32_t>(i), b = static_cast<int32_t>(j);
        if (i == j || forest->find(a) == forest->find(b)) return;
        if (decision.accepts(i, j, value)) forest->join(a, b);
      });
    }
  });
  Forest all(n);
  for (const auto& forest : forests) {
    for (int32_t i = 0; forest && i < n; ++i) all.join(i, forest->find(i));
  }
  int64_t next = 0;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t root = all.find(i);
    labels[i] = root == i ? next++ : labels[root];
  }
}

}  // namespace sapwood::similarity
