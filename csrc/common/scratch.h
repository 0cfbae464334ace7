// Scratch memory of one call, kept by the thread for its next one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace sapwood {

// Blocks of memory that a thread keeps for its next call: fresh pages cost as much as the product
// of two matrices of side 100.
class BlockCache {
 public:
  struct Block {
    void* address;
    size_t bytes;
  };

  static Block take(size_t bytes) {
    std::vector<Block>& kept = cache().kept_;
    for (size_t i = 0; i < kept.size(); ++i) {
      if (kept[i].bytes < bytes) continue;
      const Block found = kept[i];
      kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(i));
      return found;
    }
    return {::operator new(bytes, kAlign), bytes};
  }

  static void give_back(const Block& block) {
    std::vector<Block>& kept = cache().kept_;
    if (block.bytes <= kLargest && kept.size() < kMost) {
      kept.push_back(block);
    } else {
      ::operator delete(block.address, kAlign);
    }
  }

  ~BlockCache() {
    for (const Block& block : kept_) ::operator delete(block.address, kAlign);
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  static constexpr size_t kLargest = size_t{4} << 20, kMost = 4;
  std::vector<Block> kept_;

  static BlockCache& cache() {
    thread_local BlockCache instance;
    return instance;
  }
};

// Uninitialised memory for one call, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : block_(BlockCache::take(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T))) {}
  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, {nullptr, 0})) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Scratch& operator=(Scratch&&) = delete;
  ~Scratch() {
    if (block_.address != nullptr) BlockCache::give_back(block_);
  }

  T* get() const { return static_cast<T*>(block_.address); }

 private:
  BlockCache::Block block_;
};

}  // namespace sapwood
