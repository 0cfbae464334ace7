// Loops on torch's thread pool, the only one this library uses. Bodies must not throw: they are
// called through a C callback.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace sapwood {

// f(begin, end) over [0, n); at least `grain` iterations per call, ranges of equal length.
template <class F>
void parallel_range(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

// f(chunk index, begin, end) over [0, n) in chunks whose size does not depend on the thread count:
// partial results that are combined in chunk order are bitwise the same for every thread count.
template <class F>
void parallel_chunks(int64_t n, int64_t chunk, const F& f) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  parallel_range(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c, c * chunk, std::min(n, (c + 1) * chunk));
  });
}

// f(task) for every task in [0, tasks), consecutive tasks on one thread, ranges of about equal
// weight: `weight_before(t)` is the total weight of tasks 0 .. t-1, monotone. Below `grain`, the
// weight worth a thread, everything runs on the caller.
template <class Weight, class F>
void parallel_weighted(int64_t tasks, double grain, const Weight& weight_before, const F& f) {
  if (tasks <= 0) return;
  const double total = weight_before(tasks);
  const double affordable = std::max(1.0, total / grain);
  const double available = static_cast<double>(torch::stable::get_num_threads());
  const int64_t parts = std::min(tasks, static_cast<int64_t>(std::min(affordable, available)));
  if (parts <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  const auto border =
      [&](int64_t part) {  // first task whose weight_before reaches the part's share
        const double share = total * static_cast<double>(part) / static_cast<double>(parts);
        int64_t low = 0, high = tasks;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (weight_before(middle) < share)
            low = middle + 1;
          else
            high = middle;
        }
        return low;
      };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end == parts ? tasks : border(end);
    for (int64_t t = begin == 0 ? 0 : border(begin); t < last; ++t) f(t);
  });
}

}  // namespace sapwood
