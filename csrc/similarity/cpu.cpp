// The CPU kernels of the family as ops.
#include <tuple>

#include "common/registry.h"
#include "similarity/cpu_arguments.h"
#include "similarity/cpu_clusters.h"
#include "similarity/cpu_pairs.h"
#include "similarity/cpu_topk.h"

namespace sapwood::similarity {
namespace {

template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Double) return f(double{});
  return f(float{});
}

// Tensors as the kernels read them: contiguous, in the type they compute in.
struct Inputs {
  Inputs(const char* op, const Tensor& x_in, const std::optional<Tensor>& y_in) {
    check_rows(op, "x", x_in);
    type = compute_type(x_in.scalar_type());
    x = contiguous_as(x_in, type);
    if (y_in) {
      check_candidates(op, *y_in, x_in);
      y = contiguous_as(*y_in, type);
    }
  }

  ScalarType type;
  Tensor x;
  std::optional<Tensor> y;
};

Tensor row_normalize(const Tensor& x_in, const std::string& kind_name) {
  const Kind kind = parse_unit_kind("row_normalize", kind_name);
  check_rows("row_normalize", "x", x_in);
  const Tensor x = contiguous_as(x_in, compute_type(x_in.scalar_type()));
  // A copy that was made for the kernel is overwritten: one copy of the input is enough.
  const bool own = x.const_data_ptr() != x_in.const_data_ptr();
  const Tensor out = own ? x : new_tensor(x, x.sizes());
  const int64_t n = x.size(0), k = x.size(1);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    parallel_range(n, 1 + 32768 / std::max<int64_t>(1, k), [&](int64_t begin, int64_t end) {
      std::vector<T> copy(static_cast<size_t>(own ? k : 0));
      for (int64_t i = begin; i < end; ++i) {
        Row row;
        double squares = 0;
        const T* entries = from + i * k;
        if (own) {
          std::copy(entries, entries + k, copy.begin());
          entries = copy.data();
        }
        SAPWOOD_ISA_CALL(describe_row(entries, k, kind, 1.0, row, squares));
        SAPWOOD_ISA_CALL(normalize_row(entries, to + i * k, k, row, nullptr));
      }
    });
  });
  return contiguous_as(out, x_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_pairs(
    const Tensor& x, const std::optional<Tensor>& y, double threshold, const std::string& kind,
    bool absolute, bool include_self, int64_t max_pairs, bool recheck,
    const std::string& precision) {
  const char* op = "similarity_pairs";
  const bool bf16 = parse_precision(op, precision, recheck);
  const Inputs in(op, x, y);
  const Kind parsed = parse_kind(op, kind);
  Tensor row, col, value;
  const Tensor truncated = new_tensor(in.x, {}, ScalarType::Bool);
  with_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(in.x, in.y, parsed, absolute, recheck, bf16);
    PairSearch<T> search(problem, threshold, include_self, max_pairs);
    search.run();
    row = new_tensor(in.x, {search.size()}, ScalarType::Long);
    col = new_tensor(in.x, {search.size()}, ScalarType::Long);
    value = new_tensor(in.x, {search.size()});
    search.copy(mutable_data<int64_t>(row), mutable_data<int64_t>(col), mutable_data<T>(value));
    *mutable_data<bool>(truncated) = search.truncated();
  });
  return {row, col, value, truncated};
}

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& x, const std::optional<Tensor>& y,
                                           int64_t k, const std::string& kind, bool absolute,
                                           bool include_self, bool recheck,
                                           const std::string& precision) {
  const char* op = "similarity_topk";
  const bool bf16 = parse_precision(op, precision, recheck);
  const Inputs in(op, x, y);
  const Kind parsed = parse_kind(op, kind);
  check_k(op, k);
  const Tensor values = new_tensor(in.x, {in.x.size(0), k});
  const Tensor indices = new_tensor(in.x, {in.x.size(0), k}, ScalarType::Long);
  with_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(in.x, in.y, parsed, absolute, recheck, bf16);
    TopkSearch<T>(problem, k, include_self)
        .run(k, mutable_data<T>(values), mutable_data<int64_t>(indices));
  });
  return {values, indices};
}

Tensor similarity_clusters(const Tensor& x, double threshold, const std::string& kind,
                           bool absolute) {
  const char* op = "similarity_clusters";
  const Inputs in(op, x, std::nullopt);
  const Kind parsed = parse_kind(op, kind);
  const Tensor labels = new_tensor(in.x, {in.x.size(0)}, ScalarType::Long);
  with_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(in.x, std::nullopt, parsed, absolute, true);
    find_clusters(problem, threshold, mutable_data<int64_t>(labels));
  });
  return labels;
}

}  // namespace
}  // namespace sapwood::similarity

SAPWOOD_CPU_IMPL(m) {
  using namespace sapwood::similarity;
  m.impl("row_normalize", TORCH_BOX(&row_normalize));
  m.impl("similarity_pairs", TORCH_BOX(&similarity_pairs));
  m.impl("similarity_topk", TORCH_BOX(&similarity_topk));
  m.impl("similarity_clusters", TORCH_BOX(&similarity_clusters));
}
