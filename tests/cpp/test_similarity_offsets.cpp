// The offsets of the device kernels of similarity where 32 bits end: keys of pairs, tiles, and rows
// more than 2^31 elements into a matrix. The matrices are reserved, not filled: only the pages that
// are touched exist. Torch-free.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "expect.h"
#include "reserved.h"
#include "similarity/cuda_pairs.cuh"
#include "similarity/cuda_topk.cuh"

namespace {

using namespace sapwood::similarity::device;

constexpr int64_t kFar = int64_t{1} << 31;
void check_keys() {
  constexpr int64_t n = 70000;  // n * n output positions
  const int64_t largest = kFar - 1;
  for (const int64_t columns : {n, int64_t{1}, int64_t{3}, largest}) {
    std::vector<int64_t> keys;
    for (const int64_t key :
         {int64_t{0}, kFar - 1, kFar, kFar + 1, 2 * kFar - 1, 2 * kFar, n * n - 1}) {
      keys.push_back(key);
    }
    keys.push_back(key_of(largest - 1, columns - 1, columns));  // of as many rows as there may be
    std::vector<int64_t> row(keys.size()), column(keys.size());
    launch_split(keys.data(), static_cast<int64_t>(keys.size()), columns, row.data(), column.data(),
                 nullptr);
    for (size_t e = 0; e < keys.size(); ++e) {
      const std::string name = "key " + std::to_string(keys[e]) + " of " + std::to_string(columns);
      expect(key_of(row[e], column[e], columns) == keys[e], name);
      expect(column[e] >= 0 && column[e] < columns && row[e] >= 0, name + " inside");
    }
  }
  expect(key_of(n - 1, n - 1, n) == 4899999999, "the last of 70 000 x 70 000");
  expect(row_of(4899999999, n) == n - 1 && column_of(4899999999, n) == n - 1, "and back");
}

void check_row_limit() {
  const std::vector<int64_t> ends{kFar - 1, kFar, kFar + 1, 2 * kFar + 5};
  for (size_t r = 0; r < ends.size(); ++r) {
    int64_t limit[2];
    launch_row_limit(ends.data(), 4, ends[r], limit, nullptr);
    expect(limit[0] == static_cast<int64_t>(r) + 1 && limit[1] == ends[r],
           "rows that hold " + std::to_string(ends[r]) + " pairs");
  }
}

__global__ void tile_kernel(Search<float> s, int64_t first_x, int64_t first_y, double* found,
                            int64_t* keys) {
  SAPWOOD_SHARED(float, left, kDepth* kPitch);
  SAPWOOD_SHARED(float, right, kDepth* kPitch);
  SAPWOOD_SHARED(float, products, kTile* kPitch);
  Sums<float> sums;
  multiply(s, first_x, first_y, left, right, sums);
  share(sums, products);
  each_pair(s, first_x, first_y, products, [&](int64_t i, int64_t j, float product) {
    const int64_t at = (i - first_x) * kTile + j - first_y;
    found[at] = s.decided(i, j, product, 1e30);
    keys[at] = key_of(i, j, s.y.n);
  });
}

// The last tile of a matrix whose last row begins at, just below or just above 2^31 elements.
void check_far_rows(int64_t n, int64_t k) {
  const std::string name = std::to_string(n) + " rows of " + std::to_string(k);
  const Reserved<float> x(n * k);
  const Reserved<Row> rows(n);
  const int64_t first = (n - 1) / kTile * kTile;
  for (int64_t i = first; i < n; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      x.get()[i * k + c] = static_cast<float>((i % 11 + 1) * (c % 3) - 4 * (c % 2));
    }
    rows.get()[i] = Row{1, 0, 1, 1};
  }
  const Operand<float> operand{x.get(), x.get(), rows.get(), n};
  const Search<float> s{operand, operand, k, Kind::dot, true, false, true, true, 0, 0};
  std::vector<double> found(kTile * kTile, NAN);
  std::vector<int64_t> keys(kTile * kTile, -1);
  auto kernel = tile_kernel;
  SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, nullptr, s, first, first, found.data(), keys.data());
  for (int64_t i = first; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      double product = 0;
      for (int64_t c = 0; c < k; ++c) {
        const auto value = [&](int64_t r) {
          return static_cast<double>((r % 11 + 1) * (c % 3) - 4 * (c % 2));
        };
        product += value(i) * value(j);
      }
      const auto at = static_cast<size_t>((i - first) * kTile + j - first);
      expect(found[at] == product, name + " product");
      expect(s.exact(i, j) == product, name + " exact");
      expect(keys[at] / n == i && keys[at] % n == j, name + " key");
    }
  }
}

__global__ void normalize_last_kernel(const float* x, int64_t n, int64_t k, float* unit,
                                      Row* rows) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  normalize_row(x, n - 1 - warp, k, Kind::cosine, lane, unit, rows);
}

__global__ void rank_last_kernel(Search<float> s, Lists lists, float* values, int64_t* indices) {
  SAPWOOD_SHARED(float, left, kDepth* kPitch);
  SAPWOOD_SHARED(float, right, kDepth* kPitch);
  SAPWOOD_SHARED(float, products, kTile* kPitch);
  rank_tile(s, Tiles::of(s).rows - 1, lists, {left, right, products}, values, indices);
}

// The last rows of a far matrix, normalised, and their nearest among a few candidates: both the rows
// and the lists of results lie more than 2^31 elements from the start.
void check_far_ranking(int64_t n, int64_t k, int64_t m) {
  const std::string name = std::to_string(n) + " rows of " + std::to_string(k) + " ranked";
  const Reserved<float> x(n * k), unit(n * k), values(n * k);
  const Reserved<Row> rows(n);
  const Reserved<double> keys(n * k);
  const Reserved<int64_t> places(n * k), indices(n * k);
  const int64_t first = n - kWarps;
  std::vector<float> y(static_cast<size_t>(m * k), 0.0f);
  for (int64_t j = 0; j < m; ++j)
    y[static_cast<size_t>(j * k + j % k)] = std::ldexp(1.0f, static_cast<int>(j / k));
  std::vector<float> unit_y(y.size());
  std::vector<Row> rows_y(static_cast<size_t>(m));
  launch_normalize(y.data(), m, k, Kind::cosine, unit_y.data(), rows_y.data(), nullptr);
  for (int64_t i = first; i < n; ++i) {  // the largest entry of row i is (i % k)
    for (int64_t c = 0; c < k; ++c)
      x.get()[i * k + c] = static_cast<float>((c - i % k + k) % k == 0 ? 2 : 1);
  }
  auto normalize = normalize_last_kernel;
  SAPWOOD_LAUNCH(normalize, 1, kThreads, 0, nullptr, x.get(), n, k, unit.get(), rows.get());
  const double norm = std::sqrt(static_cast<double>(k + 3));
  for (int64_t i = first; i < n; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      const double wanted = (c == i % k ? 2 : 1) / norm;
      expect(std::abs(unit.get()[i * k + c] - wanted) < 1e-7, name + " unit");
    }
  }
  const Operand<float> far{x.get(), unit.get(), rows.get(), n};
  const Operand<float> near{y.data(), unit_y.data(), rows_y.data(), m};
  const Search<float> s{far, near, k, Kind::cosine, false, false, false, true, 1e-6, 0};
  auto rank = rank_last_kernel;
  SAPWOOD_LAUNCH(rank, 1, kThreads, 0, nullptr, s, Lists{keys.get(), places.get(), k}, values.get(),
                 indices.get());
  for (int64_t i = first; i < n; ++i) {
    expect(indices.get()[i * k] == i % k, name + " nearest");
    expect(std::abs(values.get()[i * k] - 2 / norm) < 1e-7, name + " value");
    expect(indices.get()[i * k + 1] == i % k + k, name + " second");  // the same direction
  }
}

void check_tiles() {
  Search<float> s{};
  for (const int64_t n : {kFar - 1, int64_t{70000}}) {
    s.x.n = s.y.n = n;
    const Tiles tiles = Tiles::of(s);
    const int64_t side = n / kTile + (n % kTile != 0);
    expect(tiles.rows == side && tiles.count() == side * side, "tiles of " + std::to_string(n));
    expect(grid_of(tiles.count(), 1) == std::min<int64_t>(side * side, 0x7fffffff), "blocks");
  }
}

}  // namespace

int main() {
  check_keys();
  check_row_limit();
  check_tiles();
  check_far_rows(kFar / 16, 16);       // ends at 2^31
  check_far_rows(kFar / 16 + 1, 16);   // the last row begins there
  check_far_rows(kFar / 16 + 70, 16);  // a whole tile behind
  check_far_rows(kFar / 7 + 3, 7);     // the border is inside a row
  check_far_ranking(kFar / 16 + 5, 16, 70);
  check_far_ranking(kFar / 7 + 5, 7, 20);
  if (failures == 0) std::printf("all offsets are right\n");
  return failures == 0 ? 0 : 1;
}
