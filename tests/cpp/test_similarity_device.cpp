// The device kernels of similarity through their launch functions, against sums in double. It needs
// no torch library, so ThreadSanitizer can watch every kernel.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "similarity/cuda_pairs.cuh"
#include "similarity/cuda_topk.cuh"

namespace {

using namespace sapwood::similarity::device;

// Random rows with a zero row, a copy and a row that is not finite, described and normalised.
struct Side {
  Side(int64_t n, int64_t k, Kind kind, unsigned seed)
      : n(n), x(static_cast<size_t>(n * k)), unit(x.size()), rows(static_cast<size_t>(n)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(random);
    if (n > 6) {
      std::fill_n(x.begin() + 2 * k, k, 0.0f);
      std::copy_n(x.begin(), k, x.begin() + 5 * k);
      if (k > 0) x[static_cast<size_t>(4 * k)] = NAN;
    }
    launch_normalize(x.data(), n, k, kind, unit.data(), rows.data(), nullptr);
  }
  Operand<float> operand() const { return {x.data(), unit.data(), rows.data(), n}; }

  int64_t n;
  std::vector<float> x, unit;
  std::vector<Row> rows;
};

double similarity(const float* a, const float* b, int64_t k, Kind kind) {
  double ab = 0, aa = 0, bb = 0, distance = 0;
  for (int64_t c = 0; c < k; ++c) {
    const double u = a[c], v = b[c];
    ab += u * v;
    aa += u * u;
    bb += v * v;
    distance += (u - v) * (u - v);
  }
  const bool finite = std::isfinite(aa) && std::isfinite(bb);
  if (kind == Kind::euclidean) return finite ? -distance : -INFINITY;
  if (!finite) return 0;
  if (kind == Kind::dot) return ab;
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa) / std::sqrt(bb) : 0;
}

struct Case {
  int64_t n, m, k;  // m is 0: rows with themselves
  Kind kind;
  double threshold;

  std::string name(const char* what) const {
    return std::string(what) + " N=" + std::to_string(n) + " M=" + std::to_string(m) +
           " K=" + std::to_string(k) + " kind=" + std::to_string(static_cast<int>(kind));
  }
};

void check_pairs(const Case& c, const Search<float>& s, const std::vector<double>& wanted) {
  std::vector<std::pair<int64_t, int64_t>> expected;
  for (int64_t i = 0; i < s.x.n; ++i) {
    for (int64_t j = s.self ? i + 1 : 0; j < s.y.n; ++j) {
      if (wanted[static_cast<size_t>(i * s.y.n + j)] >= c.threshold) expected.emplace_back(i, j);
    }
  }
  const auto capacity = static_cast<int64_t>(expected.size());
  std::vector<int64_t> keys(static_cast<size_t>(capacity + 1), -1);
  std::vector<float> values(keys.size());
  std::vector<unsigned long long> counts(static_cast<size_t>(s.x.n + 1), 0);
  launch_pairs(s, c.threshold,
               {keys.data(), values.data(), capacity, s.x.n, counts.data(), counts.data() + s.x.n},
               nullptr);
  expect(static_cast<int64_t>(counts.back()) == capacity, c.name("count"));
  expect(keys.back() == -1, c.name("capacity"));
  keys.pop_back();
  std::sort(keys.begin(), keys.end());
  std::vector<int64_t> row(expected.size()), column(expected.size());
  launch_split(keys.data(), capacity, s.y.n, row.data(), column.data(), nullptr);
  for (size_t e = 0; e < expected.size(); ++e) {
    expect(expected[e] == std::pair(row[e], column[e]), c.name("pair"));
  }
}

void check_topk(const Case& c, const Search<float>& s, const std::vector<double>& wanted,
                int64_t k) {
  const auto room = static_cast<size_t>(s.x.n * k);
  std::vector<double> keys(room);
  std::vector<int64_t> places(room), indices(room);
  std::vector<float> values(room);
  launch_topk(s, {keys.data(), places.data(), k}, values.data(), indices.data(), nullptr);
  for (int64_t i = 0; i < s.x.n; ++i) {
    std::vector<double> best;
    for (int64_t j = 0; j < s.y.n; ++j) {
      if (!s.self || i != j) best.push_back(wanted[static_cast<size_t>(i * s.y.n + j)]);
    }
    std::sort(best.rbegin(), best.rend());
    for (int64_t e = 0; e < k; ++e) {
      const int64_t j = indices[static_cast<size_t>(i * k + e)];
      if (e >= static_cast<int64_t>(best.size())) {
        expect(j == -1, c.name("padding"));
        continue;
      }
      const double found = wanted[static_cast<size_t>(i * s.y.n + j)];
      const double other = best[static_cast<size_t>(e)];
      expect(found == other || std::abs(found - other) < 1e-9, c.name("rank"));
    }
  }
}

void check_clusters(const Case& c, const Search<float>& s, const std::vector<double>& wanted) {
  const int64_t n = s.x.n;
  std::vector<int32_t> parent(static_cast<size_t>(n));
  launch_clusters(s, c.threshold, parent.data(), nullptr);
  std::vector<int64_t> roots(parent.size()), labels(parent.size()), first(parent.size());
  launch_roots(parent.data(), n, roots.data(), nullptr);
  for (size_t i = 1; i < roots.size(); ++i) roots[i] += roots[i - 1];
  launch_labels(parent.data(), n, roots.data(), labels.data(), nullptr);
  for (size_t i = 0; i < first.size(); ++i) first[i] = static_cast<int64_t>(i);
  for (bool changed = true; changed;) {  // every row takes the first member its neighbours know
    changed = false;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        if (!(wanted[static_cast<size_t>(i * n + j)] >= c.threshold)) continue;
        const auto a = static_cast<size_t>(i), b = static_cast<size_t>(j);
        const int64_t least = std::min(first[a], first[b]);
        changed |= first[a] != least || first[b] != least;
        first[a] = first[b] = least;
      }
    }
  }
  int64_t next = 0;
  std::vector<int64_t> number(first.size(), -1);
  for (size_t i = 0; i < first.size(); ++i) {
    int64_t& label = number[static_cast<size_t>(first[i])];
    if (label < 0) label = next++;
    expect(labels[i] == label, c.name("label"));
  }
}

void check(const Case& c) {
  const Side x(c.n, c.k, c.kind, 1), other(std::max<int64_t>(c.m, 1), c.k, c.kind, 2);
  const bool self = c.m == 0;
  const Side& y = self ? x : other;
  const Search<float> s{x.operand(), y.operand(), c.k,  c.kind, self,
                        false,       false,       true, 1e-5,   1e-30};
  std::vector<double> wanted;
  for (int64_t i = 0; i < x.n; ++i) {
    for (int64_t j = 0; j < y.n; ++j) {
      wanted.push_back(similarity(x.x.data() + i * c.k, y.x.data() + j * c.k, c.k, c.kind));
    }
  }
  check_pairs(c, s, wanted);
  check_topk(c, s, wanted, 3);
  check_topk(c, s, wanted, y.n + 2);
  if (self) check_clusters(c, s, wanted);
}

}  // namespace

int main() {
  for (const auto& [kind, threshold] : {std::pair(Kind::cosine, 0.31), std::pair(Kind::dot, 2.1),
                                        std::pair(Kind::euclidean, -9.7)}) {
    check({70, 0, 9, kind, threshold});
    check({9, 67, 5, kind, threshold});
    check({1, 0, 3, kind, threshold});
    check({3, 67, 0, kind, threshold});  // no columns: the tiles follow each other at once
  }
  if (failures == 0) std::printf("all device kernels are right\n");
  return failures == 0 ? 0 : 1;
}
