// log_scan_path: the states of a chain, walked backwards: the best ones, or exact draws.
#pragma once

#include "logsemiring/cpu_scan.h"
#include "logsemiring/philox.h"

namespace sapwood::logsemiring {

// One place of a path: where x + y is largest, or a draw by its exponentials; -1 without mass.
struct PathPlace {
  uint64_t key;
  uint32_t path;
  bool maximum;

  int64_t operator()(const double* x, const double* y, int64_t k, int64_t step) const {
    if (maximum) return largest_term(x, y, k);
    double best = -kInf<double>;
    int64_t at = -1;
    for (int64_t i = 0; i < k; ++i) {
      const double term = x[i] + y[i];
      if (!(term > -kInf<double>)) continue;  // NaN takes no part
      const double score = term + gumbel(philox(key, static_cast<uint32_t>(i), 0,
                                                static_cast<uint32_t>(step), path));
      if (score > best || at < 0) {
        best = score;
        at = i;
      }
    }
    return at;
  }
};

// t (k, k) matrices of one chain, u its states (L + 1, k), end (k), path (L + 1).
template <class T>
void walk_back(const Chains<T>& t, int64_t chain, int64_t steps, int64_t k, const double* u,
               const double* end, const PathPlace& place, double* column, int64_t* path) {
  path[steps] = place(u + steps * k, end, k, steps);
  for (int64_t l = steps - 1; l >= 0; --l) {
    path[l] = -1;
    if (path[l + 1] < 0) continue;
    const T* from = t.data + chain * t.batch + l * t.step + path[l + 1] * t.col;
    for (int64_t i = 0; i < k; ++i) column[i] = static_cast<double>(from[i * t.row]);
    path[l] = place(u + l * k, column, k, l);
  }
}

// t (B, L, k, k), states (B, L + 1, k), final (B, k) -> (S, B, L + 1).
inline Tensor log_scan_path(const Tensor& t_in, const Tensor& states_in, const Tensor& final_in,
                            int64_t num_samples, int64_t seed, bool maximum) {
  const char* op = "log_scan_path";
  check_dim(op, "t", t_in, 4);
  const int64_t batch = t_in.size(0), steps = t_in.size(1), k = t_in.size(2);
  check_shape(op, "t", t_in, {batch, steps, k, k});
  check_shape(op, "states", states_in, {batch, steps + 1, k});
  check_shape(op, "final", final_in, {batch, k});
  check_floating(op, "t", t_in);
  const Tensor t = as_compute(t_in);
  const Tensor states = as_contiguous(torch::stable::to(states_in, ScalarType::Double));
  const Tensor end = as_contiguous(torch::stable::to(final_in, ScalarType::Double));
  const Tensor out = new_tensor(t, {num_samples, batch, steps + 1}, ScalarType::Long);
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, steps * k));
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    const Chains<T> chains(t);
    parallel_range(num_samples * batch, grain, [&](int64_t begin, int64_t stop) {
      std::vector<double> column(static_cast<size_t>(k));
      for (int64_t p = begin; p < stop; ++p) {
        const int64_t chain = p % batch;
        const PathPlace place{static_cast<uint64_t>(seed), static_cast<uint32_t>(p), maximum};
        walk_back<T>(chains, chain, steps, k, data<double>(states) + chain * (steps + 1) * k,
                     data<double>(end) + chain * k, place, column.data(),
                     mutable_data<int64_t>(out) + p * (steps + 1));
      }
    });
  });
  return out;
}

}  // namespace sapwood::logsemiring
