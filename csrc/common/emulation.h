// CUDA kernels on the host. Blocks run one after another; the threads of a block are real threads,
// one team per launch, so that a missing __syncthreads is a data race for ThreadSanitizer.
//
// Shared memory is an arena that is filled with 0xFF before each block: 0xFF is NaN as a float and
// -1 as an integer, so that reading what was never written does not show the previous block's
// value. Under AddressSanitizer everything in the arena but the declared arrays is poisoned.
// A thread that returns early leaves its barriers, as on the device. Each warp has a barrier of its
// own, so that a single warp may shuffle alone. Shuffles, ballots and atomics order no other memory,
// as on the device, so that they do not hide a missing barrier from ThreadSanitizer. Compile with
// SAPWOOD_EMU_SHUFFLE=seed to run the blocks in a random order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "common/emulated_block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace sapwood::emulation {

inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("sapwood: warp operations take the full mask");
}

// Gives each lane the value of lane `source` of its warp, its own where `valid` is false.
template <class T>
T exchange(unsigned mask, T value, unsigned source, bool valid) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  require_full(mask);
  const Unordered unordered;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  slot_of(self.thread).store(bits);
  sync_warp();
  T received = value;
  const unsigned from = self.thread / kWarpSize * kWarpSize + source;
  if (valid && from < self.block->slot.size()) {
    bits = slot_of(from).load();
    std::memcpy(&received, &bits, sizeof(T));
  }
  sync_warp();
  return received;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  require_full(mask);
  const Unordered unordered;
  slot_of(self.thread).store(predicate ? 1 : 0);
  sync_warp();
  const auto threads = static_cast<unsigned>(self.block->slot.size());
  const unsigned first = self.thread / kWarpSize * kWarpSize;
  const unsigned last = std::min(first + kWarpSize, threads);
  unsigned votes = 0;
  for (unsigned i = first; i < last; ++i)
    votes |= (slot_of(i).load() == 1 ? 1u : 0u) << (i - first);
  sync_warp();
  return votes;
}

// With SAPWOOD_EMU_LAST_BLOCKS=n in the environment a launch runs its last n blocks alone: so tests
// reach the far end of grids that would take hours.
inline uint64_t skipped_blocks(uint64_t count) {
  const char* last = std::getenv("SAPWOOD_EMU_LAST_BLOCKS");
  return last == nullptr ? 0 : count - std::min<uint64_t>(count, std::strtoull(last, nullptr, 10));
}

inline std::vector<uint64_t> block_order(uint64_t count) {
  const uint64_t first = skipped_blocks(count);
  std::vector<uint64_t> order(count - first);
  std::iota(order.begin(), order.end(), first);
#if defined(SAPWOOD_EMU_SHUFFLE)
  std::shuffle(order.begin(), order.end(), std::mt19937_64(SAPWOOD_EMU_SHUFFLE));
#endif
  return order;
}

inline void check_configuration(dim3 grid, dim3 block, size_t bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0) {
    throw std::runtime_error("sapwood: a block must have 32 to 1024 threads in whole warps, got " +
                             std::to_string(threads));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    throw std::runtime_error("sapwood: invalid grid (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
  }
  if (bytes > kSharedLimit) {
    throw std::runtime_error("sapwood: a launch asks for more than 48 KiB of shared memory");
  }
}

// The threads of one launch; `body` is the kernel with its arguments bound.
class Team {
 public:
  Team(dim3 grid, dim3 block, size_t bytes, std::function<void()> body)
      : grid_(grid),
        block_(block),
        threads_(block.x * block.y * block.z),
        body_(std::move(body)),
        order_(block_order(uint64_t{grid.x} * grid.y * grid.z)),
        sync_(threads_) {
    constexpr size_t kRedzones = 32 * 2 * kLine;  // alignment and gap of up to 32 arrays
    state_.dynamic_bytes = bytes;
    state_.arena.resize((kSharedLimit + kRedzones) / kLine);
  }

  void run() {
    {
      std::vector<std::jthread> threads;
      threads.reserve(threads_);
      try {
        for (unsigned t = 0; t < threads_; ++t) threads.emplace_back([this, t] { work(t); });
      } catch (...) {  // the system has no more threads: let the ones that exist go
        fail(std::current_exception());
        cancelled_ = true;
        for (size_t t = threads.size(); t < threads_; ++t) sync_.arrive_and_drop();
      }
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work(unsigned thread) {
    blockDim = block_;
    gridDim = grid_;
    threadIdx = {thread % block_.x, thread / block_.x % block_.y, thread / (block_.x * block_.y)};
    for (const uint64_t block : order_) {
      if (thread == 0) state_.reset(threads_);
      sync_.arrive_and_wait();
      if (cancelled_) return;
      const uint64_t plane = block / grid_.x;
      blockIdx = {static_cast<unsigned>(block % grid_.x), static_cast<unsigned>(plane % grid_.y),
                  static_cast<unsigned>(plane / grid_.y)};
      self = {&state_, thread, 0, 0};
      try {
        body_();
      } catch (...) {
        fail(std::current_exception());
      }
      state_.slot[thread] = kAbsent;
      state_.warp[thread / kWarpSize]->arrive_and_drop();
      state_.all->arrive_and_drop();
      sync_.arrive_and_wait();
      if (failed_) return;  // the same answer for all: nobody can fail before the next barrier
    }
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    failed_ = true;
  }

  dim3 grid_, block_;
  unsigned threads_;
  std::function<void()> body_;
  std::vector<uint64_t> order_;
  Barrier sync_;
  Block state_;
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_ = false;
  bool cancelled_ = false;
};

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t bytes, Args... args) {
  check_configuration(grid, block, bytes);
  Team(grid, block, bytes, [=] { kernel(args...); }).run();
}

// Read-modify-write with a function of the old value; returns the old value. Relaxed, as CUDA's are.
template <class T, class F>
T update(T* address, F&& f) {
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(old, f(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace sapwood::emulation

inline void __syncthreads() {
  sapwood::emulation::sync_block();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  sapwood::emulation::require_full(mask);
  sapwood::emulation::sync_warp();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return sapwood::emulation::exchange(mask, value, static_cast<unsigned>(source) % 32u, true);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = sapwood::emulation::self.thread % 32u;
  return sapwood::emulation::exchange(mask, value, lane + delta, lane + delta < 32u);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = sapwood::emulation::self.thread % 32u;
  return sapwood::emulation::exchange(mask, value, lane - delta, lane >= delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const unsigned source = sapwood::emulation::self.thread % 32u ^ static_cast<unsigned>(lanes);
  return sapwood::emulation::exchange(mask, value, source, source < 32u);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return sapwood::emulation::ballot(mask, predicate != 0);
}

template <class T>
T atomicAdd(T* address, T value) {
  return sapwood::emulation::update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return sapwood::emulation::update(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return sapwood::emulation::update(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicCAS(T* address, T expected, T desired) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, desired,
                                                       std::memory_order_relaxed);
  return expected;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
