// log_scan: states u (B, L + 1, R, k) in double with u_0 = init and u_{t+1} = u_t (x) T_t.
#pragma once

#include <tuple>

#include "logsemiring/cpu_matmul.h"

namespace sapwood::logsemiring {

// The k x k matrix of one step in double, transposed: out[j * k + i] = T[i, j].
template <class T>
void widen_step(const Tensor& t, int64_t batch, int64_t step, int64_t k, double* out) {
  const T* from = data<T>(t) + batch * t.stride(0) + step * t.stride(1);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      out[j * k + i] = static_cast<double>(from[i * t.stride(2) + j * t.stride(3)]);
    }
  }
}

// next[j] = log sum_i exp(state[i] + step[j, i]).
inline double scan_output(const double* state, const double* step, int64_t k) {
  double top = -kInf<double>, sum = 0;
  bool nan = false;
  for (int64_t i = 0; i < k; ++i) {
    const double x = state[i] + step[i];
    nan = nan || x != x;
    top = x > top ? x : top;
  }
  if (nan) return std::nan("");
  if (top == -kInf<double> || top == kInf<double>) return top;
  for (int64_t i = 0; i < k; ++i) {
    const double x = state[i] + step[i];
    sum += x == top ? 1.0 : std::exp(x - top);
  }
  return top + std::log(sum);
}

// The weights p[i] = exp(state[i] + step[i]) / sum, by the policy for infinities.
inline void scan_weights(const double* state, const double* step, int64_t k, double* p) {
  double top = -kInf<double>, sum = 0;
  bool nan = false;
  for (int64_t i = 0; i < k; ++i) {
    p[i] = state[i] + step[i];
    nan = nan || p[i] != p[i];
    top = p[i] > top ? p[i] : top;
  }
  for (int64_t i = 0; i < k; ++i) {
    p[i] = nan ? std::nan("") : p[i] == top && top > -kInf<double> ? 1.0 : std::exp(p[i] - top);
    if (top == -kInf<double> && !nan) p[i] = 0;
    sum += p[i];
  }
  for (int64_t i = 0; i < k && sum != 0; ++i) p[i] /= sum;
}

inline void check_scan(const char* op, const Tensor& t, const Tensor& init) {
  check_dim(op, "t", t, 4);
  check_shape(op, "t", t, {t.size(0), t.size(1), t.size(2), t.size(2)});
  check_dim(op, "init", init, 3);
  check_shape(op, "init", init, {t.size(0), init.size(1), t.size(2)});
  check_floating(op, "t", t);
  check_like(op, "init", init, t);
}

inline Tensor log_scan(const Tensor& t_in, const Tensor& init_in) {
  check_scan("log_scan", t_in, init_in);
  const Tensor t = as_compute(t_in);
  const Tensor init = torch::stable::contiguous(torch::stable::to(init_in, ScalarType::Double));
  const int64_t b = t.size(0), steps = t.size(1), k = t.size(2), r = init.size(1), width = r * k;
  const Tensor states = torch::stable::new_empty(init, {b, steps + 1, r, k});
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, steps * width * k));
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    parallel_range(b, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> step(static_cast<size_t>(k * k));
      for (int64_t e = begin; e < end; ++e) {
        double* u = mutable_data<double>(states) + e * (steps + 1) * width;
        std::copy_n(data<double>(init) + e * width, width, u);
        for (int64_t l = 0; l < steps; ++l, u += width) {
          widen_step<T>(t, e, l, k, step.data());
          for (int64_t i = 0; i < width; ++i) {
            u[width + i] = scan_output(u + i / k * k, step.data() + i % k * k, k);
          }
        }
      }
    });
  });
  return states;
}

// grad (B, L + 1, R, k) of the states in double -> dt (B, L, k, k) in t's dtype, dinit (B, R, k).
inline std::tuple<Tensor, Tensor> log_scan_backward(const Tensor& grad_in, const Tensor& t_in,
                                                    const Tensor& states_in) {
  const char* op = "log_scan_backward";
  check_dim(op, "states", states_in, 4);
  check_shape(op, "grad", grad_in, states_in.sizes());
  check_dim(op, "t", t_in, 4);
  check_floating(op, "t", t_in);
  const Tensor t = as_compute(t_in);
  const Tensor states = torch::stable::contiguous(torch::stable::to(states_in, ScalarType::Double));
  const Tensor grad = torch::stable::contiguous(torch::stable::to(grad_in, ScalarType::Double));
  const int64_t b = t.size(0), steps = t.size(1), k = t.size(2), r = states.size(2), width = r * k;
  check_shape(op, "states", states, {b, steps + 1, r, k});
  const Tensor dt = torch::stable::new_empty(t, {b, steps, k, k});
  const Tensor dinit = torch::stable::new_empty(states, {b, r, k});
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, steps * width * k));
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    parallel_range(b, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> step(static_cast<size_t>(k * k)), p(static_cast<size_t>(k));
      std::vector<double> g(static_cast<size_t>(width)), sums(static_cast<size_t>(k * k));
      std::vector<double> before(static_cast<size_t>(k));
      for (int64_t e = begin; e < end; ++e) {
        const double* u = data<double>(states) + e * (steps + 1) * width;
        const double* given = data<double>(grad) + e * (steps + 1) * width;
        std::copy_n(given + steps * width, width, g.data());
        for (int64_t l = steps - 1; l >= 0; --l) {
          widen_step<T>(t, e, l, k, step.data());
          std::fill(sums.begin(), sums.end(), 0.0);
          for (int64_t row = 0; row < r; ++row) {
            double* from = g.data() + row * k;
            std::copy_n(given + l * width + row * k, k, before.data());
            for (int64_t j = 0; j < k; ++j) {
              if (from[j] == 0) continue;
              scan_weights(u + l * width + row * k, step.data() + j * k, k, p.data());
              for (int64_t i = 0; i < k; ++i) {
                sums[static_cast<size_t>(i * k + j)] += from[j] * p[static_cast<size_t>(i)];
                before[static_cast<size_t>(i)] += from[j] * p[static_cast<size_t>(i)];
              }
            }
            std::copy_n(before.data(), k, from);
          }
          T* to = mutable_data<T>(dt) + (e * steps + l) * k * k;
          for (int64_t i = 0; i < k * k; ++i) to[i] = static_cast<T>(sums[static_cast<size_t>(i)]);
        }
        std::copy_n(g.data(), width, mutable_data<double>(dinit) + e * width);
      }
    });
  });
  return {back_to(dt, t_in.scalar_type()), back_to(dinit, t_in.scalar_type())};
}

}  // namespace sapwood::logsemiring
