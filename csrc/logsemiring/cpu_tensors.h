// What the CPU ops of this family share: types to kernels, scratch, batches.
#pragma once

#include "common/checks.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "logsemiring/kernel.h"

namespace sapwood::logsemiring {

inline Tensor as_compute(const Tensor& t) {
  return in_type(t, compute_type(t));
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
