// The block that the emulation runs: its barriers, its shared memory, and what a thread knows of itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#endif

namespace sapwood::emulation {

inline constexpr unsigned kWarpSize = 32;
inline constexpr size_t kLine = 64;                // alignment and redzone of a shared array, bytes
inline constexpr size_t kSharedLimit = 48 * 1024;  // what a kernel gets without asking for more
inline constexpr uint64_t kAbsent = ~uint64_t{0};  // exchange slot of a thread that has returned

constexpr size_t round_up(size_t n, size_t to) {
  return (n + to - 1) / to * to;
}

// std::barrier, but a waiting thread sleeps at once. The standard one yields a few times first, and
// a yield hands a whole time slice to any busy process of the machine.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads), remaining_(threads) {}

  void arrive_and_wait() {
    const uint32_t phase = phase_.load();
    if (remaining_.fetch_sub(1) == 1) return complete();
    while (phase_.load() == phase) {
      syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
    }
  }

  void arrive_and_drop() {
    expected_.fetch_sub(1);
    if (remaining_.fetch_sub(1) == 1) complete();
  }

 private:
  void complete() {
    remaining_.store(expected_.load());
    phase_.fetch_add(1);
    syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  std::atomic<uint32_t> phase_ = 0;
  std::atomic<unsigned> expected_, remaining_;
};

// State of the block that runs now.
struct Block {
  struct alignas(kLine) Line {
    unsigned char bytes[kLine];
  };
  std::vector<Line> arena;
  size_t dynamic_bytes = 0;
  std::unique_ptr<Barrier> all;                // __syncthreads
  std::vector<std::unique_ptr<Barrier>> warp;  // __syncwarp and shuffles
  std::vector<uint64_t> slot;                  // one exchange slot per thread

  unsigned char* base() { return arena.front().bytes; }
  size_t capacity() const { return arena.size() * kLine; }

  void reset(unsigned threads) {
    ASAN_UNPOISON_MEMORY_REGION(base(), capacity());
    std::memset(base(), 0xFF, capacity());
    ASAN_POISON_MEMORY_REGION(base(), capacity());
    all = std::make_unique<Barrier>(threads);
    warp.clear();
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warp.push_back(std::make_unique<Barrier>(std::min(kWarpSize, threads - first)));
    }
    slot.assign(threads, kAbsent);
  }

  ~Block() {
    if (!arena.empty()) ASAN_UNPOISON_MEMORY_REGION(base(), capacity());
  }
};

// What a thread of the team knows of itself.
struct Self {
  Block* block = nullptr;
  unsigned thread = 0;
  size_t next = 0;    // where the next shared array starts in the arena
  size_t shared = 0;  // bytes of shared memory declared so far
};
inline thread_local Self self;

inline unsigned char* take_shared(size_t bytes) {
  const size_t at = self.next;
  self.next = round_up(at + bytes, kLine) + kLine;
  self.shared += round_up(bytes, 16);
  if (self.shared > kSharedLimit || self.next > self.block->capacity()) {
    throw std::runtime_error("sapwood: a kernel declares more than 48 KiB of shared memory");
  }
  unsigned char* address = self.block->base() + at;
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
  return address;
}

// Every thread declares the same arrays in the same order and so gets the same addresses.
template <class T>
T* shared(size_t count) {
  return reinterpret_cast<T*>(take_shared(count * sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(take_shared(self.block->dynamic_bytes));
}

inline void sync_block() {
  self.block->all->arrive_and_wait();
}
inline void sync_warp() {
  self.block->warp[self.thread / kWarpSize]->arrive_and_wait();
}

// While one exists, what its thread does to synchronise orders no memory for ThreadSanitizer.
struct Unordered {
#if defined(__SANITIZE_THREAD__)
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  Unordered() {}
#endif
  Unordered(const Unordered&) = delete;
  Unordered& operator=(const Unordered&) = delete;
};

// A thread's place for what it exchanges.
inline std::atomic_ref<uint64_t> slot_of(unsigned thread) {
  return std::atomic_ref<uint64_t>(self.block->slot[thread]);
}

}  // namespace sapwood::emulation
