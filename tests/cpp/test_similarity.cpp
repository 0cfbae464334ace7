// The kernels of similarity against the naive version in double, for every instruction set this CPU
// has: the exact similarity, and what the tiles propose for limits around their values. Torch-free;
// strips are split over two threads so that TSan sees how they share memory.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "similarity/kernel.h"

namespace {

using namespace sapwood::similarity;

// The functions of one instruction set as a type, so that a test is written once.
#define KERNELS(Name, isa_namespace, label)    \
  struct Name {                                \
    static constexpr const char* name = label; \
    template <class T>                         \
    static Tile tile() {                       \
      Tile shape{};                            \
      isa_namespace::tile_shape<T>(shape);     \
      return shape;                            \
    }                                          \
    template <class... A>                      \
    static void describe(A&&... a) {           \
      isa_namespace::describe_row(a...);       \
    }                                          \
    template <class... A>                      \
    static void normalize(A&&... a) {          \
      isa_namespace::normalize_row(a...);      \
    }                                          \
    template <class... A>                      \
    static void pack(A&&... a) {               \
      isa_namespace::pack_panel(a...);         \
    }                                          \
    template <class... A>                      \
    static void exact(A&&... a) {              \
      isa_namespace::exact_similarity(a...);   \
    }                                          \
    template <class... A>                      \
    static void propose(A&&... a) {            \
      isa_namespace::propose(a...);            \
    }                                          \
  };
KERNELS(Base, isa_base, "base")
#if defined(__x86_64__)
KERNELS(Avx2, isa_avx2, "avx2")
KERNELS(Avx512, isa_avx512, "avx512")
#endif

template <class T>
std::vector<T> random_rows(int64_t n, int64_t k) {
  std::mt19937 random(static_cast<unsigned>(n * 1009 + k));
  std::normal_distribution<double> normal;
  std::vector<T> x(static_cast<size_t>(n * k));
  for (T& v : x) v = static_cast<T>(normal(random));
  return x;
}

template <class Kernels, class T>
struct Packed {
  Packed(const std::vector<T>& x, int64_t n, int64_t k, Kind kind, int64_t width)
      : rows(static_cast<size_t>(n)),
        squares(static_cast<size_t>(n)),
        panels(static_cast<size_t>((n + width - 1) / width * width * k)) {
    std::vector<T> unit(static_cast<size_t>(n * k));
    const double* no_shift = nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      Kernels::describe(x.data() + i * k, k, kind, 1.0, rows[at], squares[at]);
      Kernels::normalize(x.data() + i * k, unit.data() + i * k, k, rows[at], no_shift);
    }
    for (int64_t i = 0; i < n; i += width) {
      Kernels::pack(unit.data() + i * k, std::min(width, n - i), k, width, panels.data() + i * k);
    }
  }
  std::vector<Row> rows;
  std::vector<double> squares;
  std::vector<T> panels;
};

template <class Kernels, class T>
void check(int64_t n, int64_t m, int64_t k, Kind kind, bool absolute) {
  const std::string name = std::string(Kernels::name) + (sizeof(T) == 8 ? " double" : " float") +
                           " N=" + std::to_string(n) + " M=" + std::to_string(m) +
                           " K=" + std::to_string(k) + " kind=" + std::to_string(int(kind));
  const Tile tile = Kernels::template tile<T>();
  const std::vector<T> x = random_rows<T>(n, k), y = random_rows<T>(m, k);
  const Packed<Kernels, T> left(x, n, k, kind, tile.rows), right(y, m, k, kind, tile.columns);
  const int64_t micro = (n + tile.rows - 1) / tile.rows;
  const T never = std::numeric_limits<T>::infinity();
  std::vector<T> row_limit(static_cast<size_t>(micro * tile.rows), never);
  std::vector<T> row_offset(row_limit.size(), T(0));
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
    row_limit[i] = kind == Kind::euclidean ? T(-0.9 * double(k)) : T(0.1);
    row_offset[i] = T(left.squares[i]);
  }
  const double bound = 64 * std::numeric_limits<T>::epsilon() * double(k + 4);
  const auto run = [&](int64_t first) {  // every second panel
    std::vector<Candidate<T>> found(kMaxCandidates);
    for (int64_t p = first; p * tile.columns < m; p += 2) {
      const std::vector<T> column_limit(static_cast<size_t>(tile.columns), never);
      std::vector<T> column_offset(static_cast<size_t>(tile.columns), T(0));
      for (int64_t c = 0; c < tile.columns && p * tile.columns + c < m; ++c) {
        column_offset[size_t(c)] = T(right.squares[size_t(p * tile.columns + c)]);
      }
      const Strip<T> strip{left.panels.data(),
                           micro,
                           right.panels.data() + p * tile.columns * k,
                           k,
                           row_limit.data(),
                           column_limit.data(),
                           row_offset.data(),
                           column_offset.data(),
                           kind == Kind::euclidean,
                           absolute};
      int64_t count = 0;
      Kernels::propose(strip, found.data(), count);
      int64_t next = 0;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < tile.columns; ++c) {
          const int64_t j = p * tile.columns + c;
          if (j >= m) continue;
          const double s = similarity_naive(x.data() + i * k, y.data() + j * k, k, kind);
          double exact = 0;
          Kernels::exact(x.data() + i * k, y.data() + j * k, k, left.rows[size_t(i)],
                         right.rows[size_t(j)], kind == Kind::euclidean, exact);
          expect(std::abs(exact - s) <= 1e-12 * (1 + std::abs(s)), name + " exact");
          const double key = absolute ? std::abs(s) : s;
          const double limit = static_cast<double>(row_limit[size_t(i)]);
          while (next < count &&
                 (found[size_t(next)].row < i ||
                  (found[size_t(next)].row == i && found[size_t(next)].column < c))) {
            ++next;  // padding reaches limits below 0
          }
          const bool hit =
              next < count && found[size_t(next)].row == i && found[size_t(next)].column == c;
          if (std::abs(key - limit) > bound) expect(hit == (key >= limit), name + " choice");
          if (hit) {
            expect(std::abs(double(found[size_t(next)].value) - s) <= bound, name + " value");
          }
        }
      }
    }
  };
  std::thread other(run, 1);
  run(0);
  other.join();
}

template <class Kernels>
void check_all() {
  for (const Kind kind : {Kind::dot, Kind::cosine, Kind::correlation, Kind::euclidean}) {
    for (const bool absolute : {false, true}) {
      check<Kernels, float>(14, 33, 9, kind, absolute);
      check<Kernels, double>(14, 33, 9, kind, absolute);
    }
    check<Kernels, float>(1, 1, 2, kind, false);
    check<Kernels, float>(61, 97, 70, kind, false);
    check<Kernels, double>(61, 97, 70, kind, false);
  }
}

#if defined(__x86_64__)
// Products of pairs of bfloat16: within the tolerance, and nothing that reaches the limit is lost.
void check_bf16(int64_t n, int64_t m, int64_t k, bool absolute) {
  const std::string name = "bf16 K=" + std::to_string(k);
  const Tile tile = Avx512::tile<float>();
  const int64_t words = (k + 1) / 2, micro = (n + tile.rows - 1) / tile.rows;
  const auto packed = [&](const std::vector<float>& x, int64_t count, int64_t width) {
    std::vector<float> unit(static_cast<size_t>(k)), pairs(static_cast<size_t>(count * words));
    std::vector<float> panels(static_cast<size_t>((count + width - 1) / width * width * words));
    for (int64_t i = 0; i < count; ++i) {
      Row row;
      double squares = 0;
      const double* no_shift = nullptr;
      Avx512::describe(x.data() + i * k, k, Kind::cosine, 1.0, row, squares);
      Avx512::normalize(x.data() + i * k, unit.data(), k, row, no_shift);
      isa_avx512::round_to_pairs(unit.data(), k, pairs.data() + i * words);
    }
    for (int64_t i = 0; i < count; i += width) {
      Avx512::pack(pairs.data() + i * words, std::min(width, count - i), words, width,
                   panels.data() + i * words);
    }
    return panels;
  };
  const std::vector<float> x = random_rows<float>(n, k), y = random_rows<float>(m, k);
  const std::vector<float> left = packed(x, n, tile.rows), right = packed(y, m, tile.columns);
  const float never = std::numeric_limits<float>::infinity(), limit = 0.1f;
  std::vector<float> row_limit(static_cast<size_t>(micro * tile.rows), never);
  std::fill_n(row_limit.begin(), n, limit);
  const std::vector<float> column_limit(static_cast<size_t>(tile.columns), never);
  const double slack = Tolerance::of<float>(Kind::cosine, k, true, true)(1, 1);
  std::vector<Candidate<float>> found(kMaxCandidates);
  for (int64_t p = 0; p * tile.columns < m; ++p) {
    const Strip<float> strip{left.data(),
                             micro,
                             right.data() + p * tile.columns * words,
                             words,
                             row_limit.data(),
                             column_limit.data(),
                             nullptr,
                             nullptr,
                             false,
                             absolute};
    int64_t count = 0;
    isa_avx512_bf16::propose(strip, found.data(), count);
    std::vector<double> values(static_cast<size_t>(n * tile.columns), NAN);
    for (int64_t e = 0; e < count; ++e) {
      const Candidate<float>& hit = found[static_cast<size_t>(e)];
      if (hit.row < n) values[static_cast<size_t>(hit.row * tile.columns + hit.column)] = hit.value;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < tile.columns && p * tile.columns + c < m; ++c) {
        const float* other = y.data() + (p * tile.columns + c) * k;
        const double s = similarity_naive(x.data() + i * k, other, k, Kind::cosine);
        const double value = values[static_cast<size_t>(i * tile.columns + c)];
        const double key = absolute ? std::abs(s) : s;
        if (std::isnan(value)) expect(key < limit + slack, name + " lost");
        if (!std::isnan(value)) expect(std::abs(value - s) <= slack, name + " value");
      }
    }
  }
}
#endif

void check_rows() {
  const float zero[3] = {0, 0, 0}, same[3] = {0.1f, 0.1f, 0.1f}, broken[3] = {1, NAN, 2};
  const double tiny[2] = {3e-310, 4e-310}, huge[2] = {3e300, 4e300};
  Row row;
  double squares = 0;
  Base::describe(zero, 3, Kind::cosine, 1.0, row, squares);
  expect(row.inverse == 0 && row.finite, "a zero row has no direction");
  Base::describe(same, 3, Kind::correlation, 1.0, row, squares);
  expect(row.inverse == 0, "a constant row has no direction under correlation");
  Base::describe(broken, 3, Kind::cosine, 1.0, row, squares);
  expect(row.inverse == 0 && !row.finite, "a row with NaN has no direction");
  for (const double* x : {tiny, huge}) {
    double unit[2];
    const double* no_shift = nullptr;
    Base::describe(x, 2, Kind::cosine, 1.0, row, squares);
    Base::normalize(x, unit, 2, row, no_shift);
    expect(std::abs(unit[0] - 0.6) < 1e-9 && std::abs(unit[1] - 0.8) < 1e-9, "norms of any size");
  }
}

}  // namespace

int main() {
  check_rows();
  check_all<Base>();
#if defined(__x86_64__)
  if (sapwood::detail::best_isa() != sapwood::Isa::base) check_all<Avx2>();
  if (sapwood::detail::best_isa() == sapwood::Isa::avx512) check_all<Avx512>();
  for (const int64_t k : {1, 2, 9, 70, 257}) {
    if (has_bf16_tiles()) check_bf16(31, 65, k, k == 9);
  }
#endif
  if (failures == 0) std::printf("all similarities are right\n");
  return failures == 0 ? 0 : 1;
}
