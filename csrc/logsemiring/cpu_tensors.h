// What the CPU ops of this family share: types to kernels, scratch, batches.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <new>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "logsemiring/kernel.h"

namespace sapwood::logsemiring {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

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

// Uninitialised memory for one call, aligned to a cache line; taken when it is first asked for.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)) {}
  ~Scratch() {
    if (block_.address != nullptr) BlockCache::give_back(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() {
    if (block_.address == nullptr) block_ = BlockCache::take(bytes_);
    return static_cast<T*>(block_.address);
  }

 private:
  size_t bytes_;
  BlockCache::Block block_{nullptr, 0};
};

// Half precision is computed in float32.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_compute(const Tensor& t) {
  const ScalarType type = compute_type(t.scalar_type());
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline Tensor back_to(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check_dtype(op, argument, t,
              type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                  type == ScalarType::BFloat16,
              "float32, float64, float16 or bfloat16");
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "sapwood.", op, ": ", argument,
                  " must have dtype ", torch::headeronly::toString(like.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// f(T{}) for float32 or float64.
template <class F>
void with_type(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  return f(float{});
}

// One matrix of a batch (B, rows, cols) of any strides.
template <class T>
Matrix<T> matrix(const Tensor& t, int64_t batch) {
  return {data<T>(t) + batch * t.stride(0), t.stride(1), t.stride(2)};
}

// Sizes of a batched product, checked: a (B, M, K), b (B, K, N).
struct Sizes {
  int64_t batch, m, n, k;

  int64_t terms() const { return m * n * k; }
};

inline Sizes product_sizes(const char* op, const Tensor& a, const Tensor& b) {
  check_dim(op, "a", a, 3);
  check_shape(op, "b", b, {a.size(0), a.size(2), b.dim() == 3 ? b.size(2) : 0});
  check_floating(op, "a", a);
  check_like(op, "b", b, a);
  return {a.size(0), a.size(1), b.size(2), a.size(2)};
}

// Terms worth a thread, and the size up to which one task takes a whole element of the batch.
inline constexpr int64_t kTermsPerTask = 65536;
inline constexpr int64_t kWholeElement = int64_t{1} << 21;

// f(element) over the batch: elements of moderate size side by side, large ones in order so that
// each has all threads.
template <class F>
void over_batch(const Sizes& s, const F& f) {
  if (s.terms() > kWholeElement) {
    for (int64_t i = 0; i < s.batch; ++i) f(i);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kTermsPerTask / std::max<int64_t>(1, s.terms()));
  parallel_range(s.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace sapwood::logsemiring
