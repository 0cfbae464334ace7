// log_scan: states u (B, L + 1, R, k) in double with u_0 = init and u_{t+1} = u_t (x) T_t. With
// `maximum` the sum of the semiring is the maximum.
#pragma once

#include <tuple>

#include "logsemiring/cpu_matmul.h"

namespace sapwood::logsemiring {

// t (B, L, k, k) of any strides; asking a tensor for one costs a call.
template <class T>
struct Chains {
  const T* data;
  int64_t batch, step, row, col;

  explicit Chains(const Tensor& t)
      : data(sapwood::data<T>(t)),
        batch(t.stride(0)),
        step(t.stride(1)),
        row(t.stride(2)),
        col(t.stride(3)) {}
};

// The k x k matrix of one step in double, transposed: out[(j * k + i) * pitch] = T[i, j].
template <class T>
void widen_step(const Chains<T>& t, int64_t batch, int64_t step, int64_t k, int64_t pitch,
                double* out) {
  const T* from = t.data + batch * t.batch + step * t.step;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      out[(j * k + i) * pitch] = static_cast<double>(from[i * t.row + j * t.col]);
    }
  }
}

// The first i of largest x[i] + y[i]; a NaN is larger than all. -1 where all are -inf.
inline int64_t largest_term(const double* x, const double* y, int64_t k) {
  double top = -kInf<double>;
  int64_t at = -1;
  for (int64_t i = 0; i < k; ++i) {
    const double term = x[i] + y[i];
    if (!(term > top || term != term)) continue;
    top = term;
    at = i;
    if (term != term) break;
  }
  return at;
}

// next[j] = log sum_i exp(state[i] + step[j, i]).
inline double scan_output(const double* state, const double* step, int64_t k, bool maximum) {
  if (maximum) {
    const int64_t at = largest_term(state, step, k);
    return at < 0 ? -kInf<double> : state[at] + step[at];
  }
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

// The weights p[i] = exp(state[i] + step[i]) / sum, by the policy for infinities; or 1 at the maximum.
inline void scan_weights(const double* state, const double* step, int64_t k, bool maximum,
                         double* p) {
  if (maximum) {
    const int64_t at = largest_term(state, step, k);
    std::fill_n(p, k, 0.0);
    if (at >= 0) p[at] = 1;
    return;
  }
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

struct ChainSizes {
  int64_t batch, steps, rows, k;
  bool maximum;

  int64_t width() const { return rows * k; }
  int64_t chunks() const { return round_up(batch, kChains) / kChains; }
  int64_t grain() const {  // chunks
    return std::max<int64_t>(1, 1024 / std::max<int64_t>(1, steps * width() * k));
  }
  // Chains worth walking side by side: alone, or with matrices beyond the cache, they are not.
  bool side_by_side(int64_t count) const { return count > 1 && k <= 32 && !maximum; }
};

template <class T>
void scan_alone(const Chains<T>& t, int64_t e, const ChainSizes& s, double* u) {
  std::vector<double> step(static_cast<size_t>(s.k * s.k));
  for (int64_t l = 0; l < s.steps; ++l, u += s.width()) {
    widen_step<T>(t, e, l, s.k, 1, step.data());
    for (int64_t i = 0; i < s.width(); ++i) {
      u[s.width() + i] =
          scan_output(u + i / s.k * s.k, step.data() + i % s.k * s.k, s.k, s.maximum);
    }
  }
}

// Where each lane's chain lies, `pitch` apart; lanes beyond `count` repeat the last chain.
struct LaneOffsets {
  int64_t at[kChains];

  LaneOffsets(int64_t pitch, int64_t count) {
    for (int64_t lane = 0; lane < kChains; ++lane) at[lane] = std::min(lane, count - 1) * pitch;
  }
};

// to[i * kChains + lane] = from[lane * pitch + i].
inline void interleave(const double* from, const LaneOffsets& lanes, int64_t size, double* to) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t lane = 0; lane < kChains; ++lane) {
      to[i * kChains + lane] = from[lanes.at[lane] + i];
    }
  }
}

// The k x k matrices of one step in double, transposed as for scan_output.
template <class T>
void interleave_step(const Chains<T>& t, int64_t first, const LaneOffsets& lanes, int64_t l,
                     int64_t k, double* to) {
  const T* from = t.data + first * t.batch + l * t.step;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const T* entry = from + i * t.row + j * t.col;
      double* place = to + (j * k + i) * kChains;
      for (int64_t lane = 0; lane < kChains; ++lane) {
        place[lane] = static_cast<double>(entry[lanes.at[lane]]);
      }
    }
  }
}

// to[lane * pitch + i] = from[i * kChains + lane] for `count` lanes.
template <class T>
void separate(const double* from, int64_t pitch, int64_t size, int64_t count, T* to) {
  if (count == kChains) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t lane = 0; lane < kChains; ++lane) {
        to[lane * pitch + i] = static_cast<T>(from[i * kChains + lane]);
      }
    }
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < size; ++i) {
      to[lane * pitch + i] = static_cast<T>(from[i * kChains + lane]);
    }
  }
}

template <class T>
void scan_together(const Chains<T>& t, int64_t first, int64_t count, const ChainSizes& s,
                   double* states) {
  const int64_t pitch = (s.steps + 1) * s.width(), lanes = s.width() * kChains;
  Scratch<double> scratch(2 * lanes + s.k * s.k * kChains);
  double *u = scratch.get(), *next = u + lanes, *step = next + lanes;
  const LaneOffsets of_t(t.batch, count);
  interleave(states, LaneOffsets(pitch, count), s.width(), u);
  for (int64_t l = 0; l < s.steps; ++l) {
    interleave_step<T>(t, first, of_t, l, s.k, step);
    for (int64_t row = 0; row < s.rows; ++row) {
      const int64_t at = row * s.k * kChains;
      SAPWOOD_ISA_CALL(scan_step(u + at, step, s.k, next + at));
    }
    separate(next, pitch, s.width(), count, states + (l + 1) * s.width());
    std::swap(u, next);
  }
}

inline Tensor log_scan(const Tensor& t_in, const Tensor& init_in, bool maximum) {
  check_scan("log_scan", t_in, init_in);
  const Tensor t = as_compute(t_in);
  const Tensor init = as_contiguous(torch::stable::to(init_in, ScalarType::Double));
  const ChainSizes s{t.size(0), t.size(1), init.size(1), t.size(2), maximum};
  const Tensor states = new_tensor(init, {s.batch, s.steps + 1, s.rows, s.k});
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    const Chains<T> chains(t);
    parallel_range(s.chunks(), s.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChains, count = std::min(kChains, s.batch - first);
        const int64_t pitch = (s.steps + 1) * s.width();
        double* u = mutable_data<double>(states) + first * pitch;
        for (int64_t e = 0; e < count; ++e) {
          std::copy_n(data<double>(init) + (first + e) * s.width(), s.width(), u + e * pitch);
        }
        if (s.side_by_side(count)) {
          scan_together<T>(chains, first, count, s, u);
        } else {
          for (int64_t e = 0; e < count; ++e) scan_alone<T>(chains, first + e, s, u + e * pitch);
        }
      }
    });
  });
  return states;
}

// u: the states of one chain; given: their gradients; dt (L, k, k), dinit (R, k).
template <class T>
void scan_backward_alone(const Chains<T>& t, int64_t e, const ChainSizes& s, const double* u,
                         const double* given, T* dt, double* dinit) {
  const int64_t k = s.k, width = s.width();
  std::vector<double> step(static_cast<size_t>(k * k)), p(static_cast<size_t>(k));
  std::vector<double> g(static_cast<size_t>(width)), sums(static_cast<size_t>(k * k));
  std::vector<double> before(static_cast<size_t>(k));
  std::copy_n(given + s.steps * width, width, g.data());
  for (int64_t l = s.steps - 1; l >= 0; --l) {
    widen_step<T>(t, e, l, k, 1, step.data());
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t row = 0; row < s.rows; ++row) {
      double* from = g.data() + row * k;
      std::copy_n(given + l * width + row * k, k, before.data());
      for (int64_t j = 0; j < k; ++j) {
        if (from[j] == 0) continue;
        scan_weights(u + l * width + row * k, step.data() + j * k, k, s.maximum, p.data());
        for (int64_t i = 0; i < k; ++i) {
          sums[static_cast<size_t>(i * k + j)] += from[j] * p[static_cast<size_t>(i)];
          before[static_cast<size_t>(i)] += from[j] * p[static_cast<size_t>(i)];
        }
      }
      std::copy_n(before.data(), k, from);
    }
    for (int64_t i = 0; i < k * k; ++i) {
      dt[l * k * k + i] = static_cast<T>(sums[static_cast<size_t>(i)]);
    }
  }
  std::copy_n(g.data(), width, dinit);
}

// The same for `count` chains from `first` on; pointers are to the first of them.
template <class T>
void scan_backward_together(const Chains<T>& t, int64_t first, int64_t count, const ChainSizes& s,
                            const double* states, const double* given, T* dt, double* dinit) {
  const int64_t k = s.k, width = s.width(), pitch = (s.steps + 1) * width;
  const int64_t lanes = width * kChains, square = k * k * kChains;
  Scratch<double> scratch(3 * lanes + 2 * square + k * kChains);
  double *u = scratch.get(), *g = u + lanes, *before = g + lanes;
  double *step = before + lanes, *sums = step + square, *p = sums + square;
  const LaneOffsets of_t(t.batch, count), of_states(pitch, count);
  interleave(given + s.steps * width, of_states, width, g);
  for (int64_t l = s.steps - 1; l >= 0; --l) {
    interleave_step<T>(t, first, of_t, l, k, step);
    interleave(states + l * width, of_states, width, u);
    interleave(given + l * width, of_states, width, before);
    std::fill_n(sums, square, 0.0);
    for (int64_t row = 0; row < s.rows; ++row) {
      const int64_t at = row * k * kChains;
      SAPWOOD_ISA_CALL(scan_step_backward(u + at, step, g + at, k, p, sums, before + at));
    }
    separate(sums, s.steps * k * k, k * k, count, dt + l * k * k);
    std::swap(g, before);
  }
  separate(g, width, width, count, dinit);
}

// grad (B, L + 1, R, k) of the states in double -> dt (B, L, k, k) in t's dtype, dinit (B, R, k).
inline std::tuple<Tensor, Tensor> log_scan_backward(const Tensor& grad_in, const Tensor& t_in,
                                                    const Tensor& states_in, bool maximum) {
  const char* op = "log_scan_backward";
  check_dim(op, "states", states_in, 4);
  check_shape(op, "grad", grad_in, states_in.sizes());
  check_dim(op, "t", t_in, 4);
  check_floating(op, "t", t_in);
  const Tensor t = as_compute(t_in);
  const Tensor states = as_contiguous(torch::stable::to(states_in, ScalarType::Double));
  const Tensor grad = as_contiguous(torch::stable::to(grad_in, ScalarType::Double));
  const ChainSizes s{t.size(0), t.size(1), states.size(2), t.size(2), maximum};
  check_shape(op, "states", states, {s.batch, s.steps + 1, s.rows, s.k});
  const Tensor dt = new_tensor(t, {s.batch, s.steps, s.k, s.k});
  const Tensor dinit = new_tensor(states, {s.batch, s.rows, s.k});
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
    const Chains<T> chains(t);
    parallel_range(s.chunks(), s.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChains, count = std::min(kChains, s.batch - first);
        const int64_t pitch = (s.steps + 1) * s.width(), square = s.steps * s.k * s.k;
        const double *u = data<double>(states) + first * pitch,
                     *given = data<double>(grad) + first * pitch;
        T* to = mutable_data<T>(dt) + first * square;
        double* to_init = mutable_data<double>(dinit) + first * s.width();
        if (s.side_by_side(count)) {
          scan_backward_together<T>(chains, first, count, s, u, given, to, to_init);
          continue;
        }
        for (int64_t e = 0; e < count; ++e) {
          scan_backward_alone<T>(chains, first + e, s, u + e * pitch, given + e * pitch,
                                 to + e * square, to_init + e * s.width());
        }
      }
    });
  });
  return {in_type(dt, t_in.scalar_type()), in_type(dinit, t_in.scalar_type())};
}

}  // namespace sapwood::logsemiring
