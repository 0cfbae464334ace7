// One step of kChains chains side by side, in double. Compiled once per instruction set. Arrays hold
// kChains numbers per entry; `step` is transposed: entry j * k + i leads from state i to state j.
namespace sapwood::logsemiring::SAPWOOD_ISA {

// The maximum of the terms of output j; NaN is ignored.
SAPWOOD_TARGET SAPWOOD_INLINE void chain_maximum(const double* u, const double* step, int64_t k,
                                                 Lanes<double>::type& top) {
  Lanes<double>::type x, y;
  top = Lanes<double>::type{} - kInf<double>;
  for (int64_t i = 0; i < k; ++i) {
    load<double>(x, u + i * kChains);
    load<double>(y, step + i * kChains);
    larger<double>(top, x + y, top);
  }
}

// x = exp(u + step - top): 1 at the maximum, infinite or not; NaN is kept.
SAPWOOD_TARGET SAPWOOD_INLINE void chain_term(const double* u, const double* step,
                                              const Lanes<double>::type& top,
                                              Lanes<double>::type& x) {
  Lanes<double>::type y;
  load<double>(x, u);
  load<double>(y, step);
  x += y;
  x = x == top ? Lanes<double>::type{} : x - top;
  exp_nonpositive<Below::zero, double>(x);
}

// next[j] = log sum_i exp(u[i] + step[j, i]). Without mass that is -inf + log k.
SAPWOOD_TARGET inline void scan_step(const double* u, const double* step, int64_t k, double* next) {
  using V = Lanes<double>::type;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t h = 0; h < kChains; h += Lanes<double>::count) {
      const double* to_j = step + j * k * kChains + h;
      V top, x, sum{};
      chain_maximum(u + h, to_j, k, top);
      for (int64_t i = 0; i < k; ++i) {
        chain_term(u + i * kChains + h, to_j + i * kChains, top, x);
        sum += x;
      }
      log_positive<double>(sum);
      store<double>(next + j * kChains + h, top + sum);
    }
  }
}

// sums[i, j] and before[i] += grad[j] * exp(u[i] + step[j, i]) / (sum over i); an output without
// gradient or without mass passes on none. p holds k entries.
SAPWOOD_TARGET inline void scan_step_backward(const double* u, const double* step,
                                              const double* grad, int64_t k, double* p,
                                              double* sums, double* before) {
  using V = Lanes<double>::type;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t h = 0; h < kChains; h += Lanes<double>::count) {
      const double* to_j = step + j * k * kChains + h;
      V top, x, y, given, sum{};
      load<double>(given, grad + j * kChains + h);
      chain_maximum(u + h, to_j, k, top);
      for (int64_t i = 0; i < k; ++i) {
        chain_term(u + i * kChains + h, to_j + i * kChains, top, x);
        sum += x;
        store<double>(p + i * kChains, x);
      }
      const V factor = given / sum, empty = V{} - kInf<double>;
      for (int64_t i = 0; i < k; ++i) {
        load<double>(x, p + i * kChains);
        x = (top == empty) & (sum == sum) ? V{} * given : x * factor;
        x = given == V{} ? V{} : x;
        load<double>(y, sums + (i * k + j) * kChains + h);
        store<double>(sums + (i * k + j) * kChains + h, y + x);
        load<double>(y, before + i * kChains + h);
        store<double>(before + i * kChains + h, y + x);
      }
    }
  }
}

}  // namespace sapwood::logsemiring::SAPWOOD_ISA
