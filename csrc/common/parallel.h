// Loops on torch's thread pool, the only one this library uses. Bodies must not throw: they are
// called through a C callback.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

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

// f(worker, task) for every task in [0, tasks); a worker takes the next task when it is free, in
// ascending order, so that a thread that others delay does not hold the rest up. For tasks of very
// different length whose results do not depend on who ran them. `workers` bounds the worker numbers.
// Unlike the loops above, f may throw: the first exception ends the loop and is thrown here.
template <class F>
void parallel_dynamic(int64_t tasks, int64_t workers, const F& f) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const auto work = [&](int64_t worker) {
    try {
      for (int64_t t = next.fetch_add(1); t < tasks; t = next.fetch_add(1)) f(worker, t);
    } catch (...) {
      next.store(tasks);
      const std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
  };
  if (workers <= 1) {
    work(0);
  } else {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) work(w);
    });
  }
  if (failure) std::rethrow_exception(failure);
}

// How many workers `operations` floating-point operations are worth.
inline int64_t useful_workers(int64_t tasks, double operations) {
  constexpr double kPerWorker = 2e6;  // about 20 us, some times what waking a thread costs
  const double affordable = std::max(1.0, operations / kPerWorker);
  const double threads = static_cast<double>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(affordable, threads)), 1,
                             std::max<int64_t>(1, tasks));
}

}  // namespace sapwood
