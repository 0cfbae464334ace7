// The torch-free kernels of logsemiring against the naive product: the exact kernel, and the packed
// product with its certificate, for every instruction set this CPU has.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "circuit_problem.h"
#include "logsemiring/kernel.h"
#include "logsemiring/kernel_circuit.h"

namespace {

using namespace sapwood::logsemiring;

void require(bool condition, const char* what, double error) {
  if (condition) return;
  std::printf("FAIL %s: error %g\n", what, error);
  std::exit(1);
}

template <class T>
std::vector<T> normal(int64_t count, double scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> draw(0.0, scale);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& v : values) v = static_cast<T>(draw(engine));
  return values;
}

template <class T>
void check(const char* what, const std::vector<T>& c, const std::vector<double>& want) {
  const double base = sizeof(T) == 4 ? 2e-5 : 1e-12, slope = sizeof(T) == 4 ? 0x1p-21 : 0x1p-50;
  for (size_t i = 0; i < c.size(); ++i) {
    const double error = std::abs(static_cast<double>(c[i]) - want[i]);
    const bool same = static_cast<double>(c[i]) == want[i] || (c[i] != c[i] && want[i] != want[i]);
    require(same || error <= base + slope * std::abs(want[i]), what, error);
  }
}

template <class T>
void exact(int64_t m, int64_t n, int64_t k, double scale, bool infinities) {
  std::vector<T> a = normal<T>(m * k, scale, 1), b = normal<T>(k * n, scale, 2);
  if (infinities) {
    std::fill_n(a.begin(), k, -kInf<T>);
    a[static_cast<size_t>(m * k - 1)] = kInf<T>;
    b[static_cast<size_t>(n - 1)] = static_cast<T>(NAN);
  }
  std::vector<double> want(static_cast<size_t>(m * n));
  log_matmul_naive(a.data(), b.data(), want.data(), m, n, k);
  std::vector<T> c(static_cast<size_t>(m * n)), pa(static_cast<size_t>(kExactDepth * kGroup));
  std::vector<T> pb(static_cast<size_t>(kExactDepth * kStrip<T>));
  const Matrix<T> left{a.data(), k, 1}, right{b.data(), n, 1};
  for (int64_t i = 0; i < m; i += kGroup) {
    for (int64_t j = 0; j < n; j += kStrip<T>) {
      const int64_t rows = std::min(kGroup, m - i), cols = std::min(kStrip<T>, n - j);
      SAPWOOD_ISA_CALL(exact_forward(left, right, k, i, rows, j, cols, pa.data(), pb.data(), false,
                                     c.data() + i * n + j, n));
    }
  }
  check("exact", c, want);
}

// One tile of the certified product; what has no certificate must be flagged.
template <class T>
void certified(int64_t k, double scale) {
  const int64_t m = kTileRows, n = kStrip<T>;
  const std::vector<T> a = normal<T>(m * k, scale, 3), b = normal<T>(k * n, scale, 4);
  std::vector<double> want(static_cast<size_t>(m * n));
  log_matmul_naive(a.data(), b.data(), want.data(), m, n, k);
  std::vector<T> alpha(static_cast<size_t>(m)), beta(static_cast<size_t>(n));
  const Matrix<T> left{a.data(), k, 1}, right{b.data(), 1, n};
  T *tops = alpha.data(), *sides = beta.data();
  SAPWOOD_ISA_CALL(row_maxima(left, m, k, tops));
  SAPWOOD_ISA_CALL(row_maxima(right, n, k, sides));
  std::vector<T> pa(static_cast<size_t>(m * k)), pb(static_cast<size_t>(n * k));
  const Operand<T> rows{a.data(), k, 1, tops}, cols{b.data(), 1, n, sides};
  for (int64_t p = 0; p < m / kRows; ++p) {
    SAPWOOD_ISA_CALL(pack_left(rows, true, p * kRows, kRows, k, pa.data() + p * kRows * k));
  }
  SAPWOOD_ISA_CALL(pack_right(cols, true, 0, n, k, pb.data()));
  std::vector<T> sums(static_cast<size_t>(kTileRows * kTileCols<T>)), c(static_cast<size_t>(m * n));
  uint8_t open[kTileRows / kGroup] = {};
  {
    const FlushSubnormals scope;
    SAPWOOD_ISA_CALL(tile_product(pa.data(), pb.data(), k, m / kRows, 1, sums.data()));
    SAPWOOD_ISA_CALL(
        finish_strip(sums.data(), tops, sides, certificate<T>(k), m, n, c.data(), n, open));
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; open[i / kGroup] != 0 && j < n; ++j) {  // the exact kernel writes these
      c[static_cast<size_t>(i * n + j)] = static_cast<T>(want[static_cast<size_t>(i * n + j)]);
    }
  }
  check("certified", c, want);
  const bool some_open =
      std::any_of(open, open + kTileRows / kGroup, [](uint8_t o) { return o != 0; });
  if (scale < 2) require(!some_open, "a group without a certificate at scale 1", 0);
  if (scale > 1e3) require(some_open, "everything has a certificate at scale 1e4", 0);
}

template <class T>
void all() {
  for (const double scale : {1.0, 30.0, 1e4}) {
    exact<T>(9, 35, 70, scale, false);
    exact<T>(1, 1, 1, scale, false);
    exact<T>(17, 40, 5000, scale, false);  // more than one pass of terms
    certified<T>(200, scale);
  }
  exact<T>(9, 35, 70, 1.0, true);
}

template <class T>
void circuit() {
  const CircuitProblem problem;
  const Circuit c = problem.circuit();
  require(problem.packs() && circuit_is_sound(c, 1) && !circuit_is_sound(c, 0), "tables", 0);
  const int64_t longest = longest_list(c);
  std::vector<double> values(c.n.columns()), slopes(values), terms(longest);
  std::vector<T> scaled(longest + kStrip<T>);
  const CircuitWalk<T> walk{values.data(), slopes.data(), terms.data(), scaled.data()};
  for (const int64_t evidence : {-1, 0, 1}) {
    std::vector<double> want = normal<double>(c.n.inputs, 2.0, 11), results;
    const std::vector<double> grad{0.5, -1.0, 2.0, 1.5};
    std::copy(want.begin(), want.end(), values.begin());
    std::fill(slopes.begin(), slopes.end(), 0.0);
    problem.solve(want, evidence, grad, results);
    circuit_row(c, &evidence, walk);
    std::vector<T> got;
    for (int64_t r = 0; r < c.n.results; ++r) {
      got.push_back(static_cast<T>(values[c.results[r]]));
      slopes[c.results[r]] += grad[r];
    }
    check("circuit", got, results);
    circuit_row_back(c, &evidence, walk);
    want.resize(c.n.inputs);
    check("slopes of a circuit", std::vector<T>(slopes.begin(), slopes.begin() + c.n.inputs), want);
  }
  const int64_t unknown = 2;
  circuit_row(c, &unknown, walk);
  require(values[c.n.inputs] == -kInf<double>, "evidence that is not known", 0);
}

}  // namespace

int main() {
  circuit<float>();
  circuit<double>();
  all<float>();
  all<double>();
  std::printf("ok\n");
  return 0;
}
