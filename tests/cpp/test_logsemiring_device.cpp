// The device kernels of logsemiring against sums in double. It needs no torch library, so
// ThreadSanitizer can watch every kernel.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "circuit_problem.h"
#include "expect.h"
#include "logsemiring/cuda_circuit_kernels.cuh"
#include "logsemiring/cuda_sequence.cuh"

namespace {

using namespace sapwood::logsemiring::device;
using sapwood::logsemiring::gumbel;
using sapwood::logsemiring::philox;

bool near(double actual, double expected, double bound = 1e-4) {
  return actual == expected || std::abs(actual - expected) <= bound * (1 + std::abs(expected));
}

double log_sum(const std::vector<double>& terms) {
  double top = -INFINITY, sum = 0;
  for (const double x : terms) top = std::max(top, x);
  if (top == -INFINITY) return top;
  for (const double x : terms) sum += std::exp(x - top);
  return top + std::log(sum);
}

// Products a (B, M, K) by b (B, K, N): values, both gradients, maxima and draws.
struct Product {
  Shape s;
  std::vector<float> a, b, grad;

  Product(int64_t batch, int64_t m, int64_t k, int64_t n)
      : s{batch, m, n, k},
        a(normal(batch * m * k, 1)),
        b(normal(batch * k * n, 2)),
        grad(normal(batch * m * n, 3)) {
    for (int64_t l = 0; l < k; ++l) a[static_cast<size_t>(l)] = -INFINITY;  // a row without mass
  }
  Batched<float> left() const { return {a.data(), s.m * s.k, s.k, 1}; }
  Batched<float> right() const { return {b.data(), s.k * s.n, s.n, 1}; }
  std::vector<double> terms(int64_t e, int64_t i, int64_t j) const {
    std::vector<double> x;
    for (int64_t l = 0; l < s.k; ++l) {
      x.push_back(static_cast<double>(left()(e, i, l)) + static_cast<double>(right()(e, l, j)));
    }
    return x;
  }
  std::string name(const char* kernel) const {
    return std::string(kernel) + " " + std::to_string(s.batch) + "x" + std::to_string(s.m) + "x" +
           std::to_string(s.k) + "x" + std::to_string(s.n);
  }
};

void check_values(const Product& p) {
  const Shape s = p.s;
  std::vector<float> c(s.batch * s.m * s.n), top(c.size()), weight(c.size());
  const Batched<float> a = p.left(), b = p.right();
  launch_reduce<float, false>(a, b.transposed(), a, b, s,
                              {c.data(), top.data(), weight.data(), nullptr}, nullptr);
  std::vector<float> da(p.a.size()), db(p.b.size());
  const Batched<float> w{weight.data(), s.m * s.n, s.n, 1}, t{top.data(), s.m * s.n, s.n, 1};
  const Batched<float> g{p.grad.data(), s.m * s.n, s.n, 1};
  launch_gradient<float, false>(a, b, a, b, t, w, w, g, s, da.data(), s.k, 1, nullptr);
  launch_gradient<float, false>(b.transposed(), a.transposed(), a, b, t.transposed(),
                                w.transposed(), w, g.transposed(), {s.batch, s.n, s.m, s.k},
                                db.data(), 1, s.n, nullptr);
  std::vector<double> want_a(da.size()), want_b(db.size());
  bool right = true;
  for (int64_t o = 0; o < s.batch * s.m * s.n; ++o) {
    const int64_t e = o / (s.m * s.n), i = o / s.n % s.m, j = o % s.n;
    const std::vector<double> x = p.terms(e, i, j);
    const double want = log_sum(x);
    right &= near(c[o], want);
    for (int64_t l = 0; l < s.k && want > -INFINITY; ++l) {
      const double share = p.grad[o] * std::exp(x[l] - want);
      want_a[(e * s.m + i) * s.k + l] += share;
      want_b[(e * s.k + l) * s.n + j] += share;
    }
  }
  expect(right, p.name("reduce"));
  right = true;
  for (size_t i = 0; i < da.size(); ++i) right &= near(da[i], want_a[i]);
  for (size_t i = 0; i < db.size(); ++i) right &= near(db[i], want_b[i]);
  expect(right, p.name("gradient"));
}

void check_choices(const Product& p) {
  const Shape s = p.s;
  const int64_t outputs = s.batch * s.m * s.n, samples = 2;
  const uint64_t key = 1234567890123;
  std::vector<float> values(outputs);
  std::vector<int64_t> places(outputs), draws(samples * outputs);
  SAPWOOD_LAUNCH(max_kernel<float>, 2u, kThreads, 0, nullptr, p.left(), p.right(), s, values.data(),
                 places.data());
  SAPWOOD_LAUNCH(sample_kernel<float>, 2u, kThreads, 0, nullptr, p.left(), p.right(), s, samples,
                 key, draws.data());
  bool best_right = true, draws_right = true;
  for (int64_t o = 0; o < samples * outputs; ++o) {
    const int64_t flat = o / (s.m * s.n), e = flat % s.batch, i = o / s.n % s.m, j = o % s.n;
    const std::vector<double> x = p.terms(e, i, j);
    int64_t best = -1, drawn = -1;
    double score = -INFINITY;
    for (int64_t l = 0; l < s.k; ++l) {
      if (x[l] == -INFINITY) continue;
      // in float, as the kernel adds
      const float sum = p.left()(e, i, l) + p.right()(e, l, j);
      if (best < 0 || sum > p.left()(e, i, best) + p.right()(e, best, j)) best = l;
      const double y = x[l] + gumbel(philox(key, static_cast<uint32_t>(l), static_cast<uint32_t>(j),
                                            static_cast<uint32_t>(i), static_cast<uint32_t>(flat)));
      if (y > score) {
        score = y;
        drawn = l;
      }
    }
    if (o < outputs) best_right &= places[o] == best;
    draws_right &= draws[o] == drawn;
  }
  expect(best_right, p.name("max"));
  expect(draws_right, p.name("sample"));
}

// Segments of a middle dimension in a scattered order; the last one is empty.
void check_segments(int64_t outer, int64_t entries, int64_t inner) {
  const int64_t count = 4;
  const std::vector<float> x = normal(outer * entries * inner, 4);
  std::vector<int64_t> ptr{0}, order;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t i = s; s + 1 < count && i < entries; i += count - 1) order.push_back(i);
    ptr.push_back(static_cast<int64_t>(order.size()));
  }
  const Division d{ptr.data(), order.data(), outer, count, inner, entries};
  const int64_t outputs = outer * count * inner;
  std::vector<float> values(outputs), weights(x.size()), maxima(outputs);
  std::vector<int64_t> places(outputs);
  const float* none = nullptr;
  SAPWOOD_LAUNCH(segment_kernel<float>, 3u, kThreads, 0, nullptr, x.data(), d, none, values.data(),
                 weights.data());
  SAPWOOD_LAUNCH(segment_max_kernel<float>, 3u, kThreads, 0, nullptr, x.data(), d, maxima.data(),
                 places.data());
  const std::vector<float> tangent = normal(outer * entries * inner, 7), grad = normal(outputs, 8);
  std::vector<float> means(outputs), second(x.size());
  SAPWOOD_LAUNCH(segment_second_kernel<float>, 3u, kThreads, 0, nullptr, x.data(), tangent.data(),
                 d, grad.data(), means.data(), second.data());
  bool right = true;
  for (int64_t t = 0; t < outputs; ++t) {
    const int64_t o = t / (count * inner), s = t / inner % count, c = t % inner;
    std::vector<double> terms;
    int64_t best = -1;
    const auto at = [&](int64_t i) { return (o * entries + i) * inner + c; };
    for (int64_t i = ptr[s]; i < ptr[s + 1]; ++i) {
      terms.push_back(x[at(order[i])]);
      if (best < 0 || x[at(order[i])] > x[at(best)]) best = order[i];
    }
    const double want = log_sum(terms);
    right &= near(values[t], want) && places[t] == best;
    right &= maxima[t] == (best < 0 ? -INFINITY : x[at(best)]);
    double mean = 0;
    for (int64_t i = ptr[s]; i < ptr[s + 1]; ++i) {
      const double p = std::exp(x[at(order[i])] - want);
      right &= near(weights[at(order[i])], p);
      mean += p * tangent[at(order[i])];
    }
    right &= near(means[t], mean);
    for (int64_t i = ptr[s]; i < ptr[s + 1]; ++i) {
      const double p = std::exp(x[at(order[i])] - want);
      right &= near(second[at(order[i])], grad[t] * p * (tangent[at(order[i])] - mean));
    }
  }
  expect(right, "segments of " + std::to_string(entries) + " by " + std::to_string(inner));
}

void check_chain(int64_t batch, int64_t length, int64_t rows, int64_t k, bool maximum) {
  const std::string name =
      "chain of " + std::to_string(length) + " k=" + std::to_string(k) + (maximum ? " max" : "");
  const std::vector<float> t = normal(batch * length * k * k, 5);
  const int64_t width = rows * k;
  std::vector<double> states(batch * (length + 1) * width), grad(states.size(), 0.0);
  const std::vector<float> start = normal(batch * width, 6);
  for (int64_t e = 0; e < batch; ++e) {
    for (int64_t i = 0; i < width; ++i) {
      states[e * (length + 1) * width + i] = start[e * width + i];
      grad[(e * (length + 1) + length) * width + i] = 1;
    }
  }
  const Chain<float> chain{t.data(), length * k * k, k * k, k, 1};
  const ChainShape s{batch, length, rows, k, maximum};
  SAPWOOD_LAUNCH(scan_kernel<float>, 2u, kThreads, 0, nullptr, chain, s, states.data());
  bool right = true;
  for (int64_t e = 0; e < batch; ++e) {
    for (int64_t l = 0; l < length; ++l) {
      const double* u = states.data() + (e * (length + 1) + l) * width;
      for (int64_t i = 0; i < width; ++i) {
        std::vector<double> terms;
        for (int64_t j = 0; j < k; ++j) terms.push_back(u[i / k * k + j] + chain(e, l, j, i % k));
        const double top = *std::max_element(terms.begin(), terms.end());
        right &= near(u[width + i], maximum ? top : log_sum(terms), 1e-12);
      }
    }
  }
  expect(right, name);
  std::vector<double> buffers(batch * 4 * width), dinit(batch * width);
  std::vector<float> dt(t.size());
  SAPWOOD_LAUNCH(scan_backward_kernel<float>, 2u, kThreads, 0, nullptr, chain, s,
                 static_cast<const double*>(states.data()), static_cast<const double*>(grad.data()),
                 buffers.data(), dt.data(), dinit.data());
  right = true;
  for (int64_t e = 0; e < batch; ++e) {  // every step hands on all of the gradient
    for (int64_t l = 0; l < length; ++l) {
      double sum = 0;
      for (int64_t i = 0; i < k * k; ++i) sum += dt[(e * length + l) * k * k + i];
      right &= near(sum, static_cast<double>(width));
    }
  }
  expect(right, name + " backward");
  if (rows != 1) return;
  const std::vector<double> end(batch * k, 0.0);
  std::vector<int64_t> paths(3 * batch * (length + 1));
  SAPWOOD_LAUNCH(path_kernel<float>, 2u, kThreads, 0, nullptr, chain, s,
                 static_cast<const double*>(states.data()), end.data(), int64_t{3}, uint64_t{7},
                 paths.data());
  right = true;
  for (int64_t p = 0; p < 3 * batch; ++p) {
    const int64_t e = p % batch, *path = paths.data() + p * (length + 1);
    double weight = states[e * (length + 1) * k + path[0]], best = -INFINITY;
    for (int64_t l = 0; l < length; ++l) weight += chain(e, l, path[l], path[l + 1]);
    for (int64_t i = 0; i < k; ++i) {
      best = std::max(best, states[(e * (length + 1) + length) * k + i]);
    }
    right &= maximum ? near(weight, best, 1e-9) : weight < best;
  }
  expect(right, name + " path");
}

// Rows of a circuit, the last of which has evidence that is not known.
void check_circuit() {
  const sapwood::logsemiring::CircuitProblem problem;
  const sapwood::logsemiring::Circuit c = problem.circuit();
  expect(problem.packs(), "circuit's tables");
  const int64_t rows = 5, inputs = c.n.inputs, results = c.n.results;
  const std::vector<float> x = normal(rows * inputs, 9), grad = normal(rows * results, 10);
  const std::vector<int64_t> evidence{-1, 0, 1, 0, 2};
  const unsigned blocks = 2;  // fewer than rows: each walks several
  std::vector<double> values(blocks * c.n.columns()), slopes(values), tops(blocks * c.n.sums);
  std::vector<double> shares(tops);
  std::vector<int32_t> lists(tops.size());
  std::vector<float> out(rows * results), back(rows * inputs);
  const CircuitInput<float> in{x.data(), 0, inputs, 1, inputs};
  const CircuitRows given{rows, evidence.data(), 1};
  const CircuitState there{values.data(), nullptr, nullptr, nullptr, nullptr};
  SAPWOOD_LAUNCH(circuit_kernel<float>, blocks, kThreads, 0, nullptr, c, in, given, there,
                 out.data());
  const CircuitState state{values.data(), slopes.data(), tops.data(), shares.data(), lists.data()};
  SAPWOOD_LAUNCH(circuit_backward_kernel<float>, blocks, kThreads, 0, nullptr, c, in, given, state,
                 grad.data(), back.data());
  bool right = true;
  for (int64_t row = 0; row + 1 < rows; ++row) {
    std::vector<double> want(x.begin() + row * inputs, x.begin() + (row + 1) * inputs), values_want;
    problem.solve(want, evidence[row],
                  {grad.begin() + row * results, grad.begin() + (row + 1) * results}, values_want);
    for (int64_t r = 0; r < results; ++r) right &= near(out[row * results + r], values_want[r]);
    for (int64_t i = 0; i < inputs; ++i) right &= near(back[row * inputs + i], want[i]);
  }
  right &= out[(rows - 1) * results + 1] == -INFINITY;
  expect(right, "circuit");
}

}  // namespace

int main() {
  check_circuit();
  for (const Product& p : {Product(1, 1, 1, 1), Product(2, 17, 33, 5), Product(1, 20, 3, 40)}) {
    check_values(p);
    check_choices(p);
  }
  check_segments(1, 70, 1);
  check_segments(2, 9, 5);
  for (const bool maximum : {false, true}) {
    check_chain(3, 4, 1, 2, maximum);
    check_chain(1, 3, 2, 17, maximum);
    check_chain(2, 5, 1, 9, maximum);
  }
  std::printf("%s\n", failures ? "failed" : "ok");
  return failures != 0;
}
