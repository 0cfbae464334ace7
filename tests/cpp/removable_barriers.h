// Included first where ThreadSanitizer watches the programs that drive the CUDA kernels. With
// SAPWOOD_REMOVED_BARRIER=masked_matmul/cuda_csr.cuh:70 in the environment the __syncthreads() or
// __syncwarp() of that line does nothing, so that one build shows for every barrier whether its absence
// is noticed: tools/check_barriers.py.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "common/emulation.h"

namespace sapwood::emulation {

// The line that the environment names. Known before main: a variable that the first thread makes
// would order that thread before the others.
class RemovedBarrier {
 public:
  RemovedBarrier() {
    const char* given = std::getenv("SAPWOOD_REMOVED_BARRIER");
    if (given == nullptr) return;
    const std::string_view place = given;
    const size_t colon = place.rfind(':');
    if (colon == std::string_view::npos || (line_ = std::atoi(given + colon + 1)) <= 0) {
      std::fprintf(stderr, "SAPWOOD_REMOVED_BARRIER must be file:line, got %s\n", given);
      std::exit(2);
    }
    file_ = "/" + std::string(place.substr(0, colon));
  }
  ~RemovedBarrier() {
    if (reached_) std::fprintf(stderr, "the removed barrier was reached\n");
  }

  bool is_at(std::string_view file, int line) {
    if (line != line_ || !file.ends_with(file_)) return false;
    reached_.store(true, std::memory_order_relaxed);
    return true;
  }

 private:
  std::string file_;
  int line_ = 0;
  std::atomic<bool> reached_ = false;
};
inline RemovedBarrier removed_barrier;

}  // namespace sapwood::emulation

// In parentheses the names are those of the functions.
#define SAPWOOD_UNLESS_REMOVED(...) \
  (::sapwood::emulation::removed_barrier.is_at(__FILE__, __LINE__) ? void() : (__VA_ARGS__))
#define __syncthreads() SAPWOOD_UNLESS_REMOVED((__syncthreads)())
#define __syncwarp(...) SAPWOOD_UNLESS_REMOVED((__syncwarp)(__VA_ARGS__))
