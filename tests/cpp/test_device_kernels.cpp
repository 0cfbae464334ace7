// The device kernels of masked_matmul through their launch functions, against sums in double. It
// needs no torch library, so ThreadSanitizer can watch every kernel.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "masked_matmul/cuda_bitmap.cuh"
#include "masked_matmul/cuda_csr.cuh"
#include "masked_matmul/cuda_mask.cuh"
#include "masked_matmul/cuda_pack.cuh"
#include "masked_matmul/cuda_sampled.cuh"

namespace {

using namespace sapwood::masked_matmul::device;

// A random problem in float: x (B, K), weight (N, K), mask with the given density.
struct Problem {
  int64_t batch, n, k;
  std::vector<float> x, weight, grad;
  std::vector<uint8_t> mask;

  Problem(int64_t batch, int64_t n, int64_t k, double density)
      : batch(batch), n(n), k(k), x(batch * k), weight(n * k), grad(batch * n), mask(n * k) {
    std::mt19937 random(static_cast<unsigned>(batch * 7919 + n * 104729 + k));
    std::normal_distribution<float> normal;
    for (auto* values : {&x, &weight, &grad}) {
      for (float& v : *values) v = normal(random);
    }
    std::bernoulli_distribution keep(density);
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = keep(random);
      if (!mask[i]) weight[i] = NAN;  // a masked-out NaN must not leak
    }
  }

  std::string name(const char* kernel) const {
    return std::string(kernel) + " B=" + std::to_string(batch) + " N=" + std::to_string(n) +
           " K=" + std::to_string(k);
  }
  Strided<float> weights() const { return {weight.data(), k, 1}; }
  Strided<uint8_t> masks() const { return {mask.data(), k, 1}; }
};

struct Packed {
  std::vector<int64_t> row_ptr;
  std::vector<float> values, bitmap_values;
  std::vector<uint16_t> columns, words;
  std::vector<int32_t> row_order;
  int64_t words_per_row;
};

Packed pack(const Problem& p) {
  Packed packed;
  packed.row_ptr.resize(p.n + 1);
  launch_count(p.masks(), p.n, p.k, packed.row_ptr.data(), nullptr);
  for (int64_t i = 0; i < p.n; ++i) packed.row_ptr[i + 1] += packed.row_ptr[i];
  const int64_t nnz = packed.row_ptr[p.n];
  packed.words_per_row = (p.k + 15) / 16;
  packed.values.resize(nnz);
  packed.bitmap_values.resize(nnz);
  packed.columns.resize(nnz);
  packed.words.resize(p.n * packed.words_per_row);
  packed.row_order.resize(p.n);
  launch_pack(p.weights(), p.masks(), packed.row_ptr.data(), p.n, p.k, packed.values.data(),
              {{packed.columns.data(), false}, nullptr, 0}, nullptr);
  launch_pack(p.weights(), p.masks(), packed.row_ptr.data(), p.n, p.k, packed.bitmap_values.data(),
              {{nullptr, false}, packed.words.data(), packed.words_per_row}, nullptr);
  launch_row_order(packed.row_ptr.data(), p.n, packed.row_order.data(), nullptr);
  return packed;
}

void check_pack(const Problem& p, const Packed& packed) {
  bool right = packed.values == packed.bitmap_values;
  int64_t at = 0;
  for (int64_t row = 0; row < p.n; ++row) {
    right &= packed.row_ptr[row] == at;
    for (int64_t c = 0; c < p.k; ++c) {
      const bool kept = p.mask[row * p.k + c];
      const int bit = packed.words[row * packed.words_per_row + c / 16] >> (c % 16) & 1;
      right &= bit == kept;
      if (kept) {
        right &= packed.columns[at] == c && packed.values[at] == p.weight[row * p.k + c];
        ++at;
      }
    }
  }
  expect(right && at == packed.row_ptr[p.n], p.name("pack"));
}

void check_products(const Problem& p, const std::vector<float>& y, const char* kernel) {
  bool right = true;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t row = 0; row < p.n; ++row) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < p.k; ++c) {
        if (!p.mask[row * p.k + c]) continue;
        const double term = double(p.x[b * p.k + c]) * p.weight[row * p.k + c];
        sum += term;
        magnitude += std::abs(term);
      }
      const double bound = 1.2e-7 * static_cast<double>(p.k) * magnitude;
      right &= std::abs(y[b * p.n + row] - sum) <= bound;
    }
  }
  expect(right, p.name(kernel));
}

void check_sampled(const Problem& p, const Packed& packed, const std::vector<float>& dot) {
  bool right = true;
  for (int64_t row = 0; row < p.n; ++row) {
    for (int64_t i = packed.row_ptr[row]; i < packed.row_ptr[row + 1]; ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const double term = double(p.grad[b * p.n + row]) * p.x[b * p.k + packed.columns[i]];
        sum += term;
        magnitude += std::abs(term);
      }
      right &= std::abs(dot[i] - sum) <= 1.2e-7 * static_cast<double>(p.batch) * magnitude;
    }
  }
  expect(right, p.name("sampled"));
}

void check_mask(const Problem& p) {
  for (const bool flat : {true, false}) {
    std::vector<uint32_t> bits(p.n * p.k), out(p.n * p.k, 1u);
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint32_t>(i + 1);
    // The transposed view of a square matrix takes the strided kernel.
    const int64_t rows = flat ? p.n : std::min(p.n, p.k), columns = flat ? p.k : rows;
    const Strided<uint32_t> w{bits.data(), flat ? p.k : 1, flat ? 1 : p.k};
    const Strided<uint8_t> m{p.mask.data(), w.row_stride, w.column_stride};
    launch_mask(w, m, out.data(), rows, columns, nullptr);
    bool right = true;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        right &= out[r * columns + c] == (m(r, c) ? w(r, c) : 0u);
      }
    }
    expect(right, p.name(flat ? "mask" : "mask, strided"));
  }
}

void check_transpose(const Problem& p, const Packed& packed) {
  const auto nnz = static_cast<int64_t>(packed.columns.size());
  std::vector<int32_t> keys(nnz), sorted(nnz);
  launch_widen({packed.columns.data(), false}, nnz, keys.data(), nullptr);
  std::vector<int64_t> perm(nnz), starts(p.k + 1);
  int64_t at = 0;
  for (int64_t c = 0; c < p.k; ++c) {  // a stable counting sort
    for (int64_t i = 0; i < nnz; ++i) {
      if (keys[i] == c) perm[at++] = i;
    }
  }
  for (int64_t i = 0; i < nnz; ++i) sorted[i] = keys[perm[i]];
  std::vector<uint16_t> rows(nnz);
  launch_transpose(sorted.data(), perm.data(), nnz, packed.row_ptr.data(), p.n, p.k,
                   {rows.data(), false}, starts.data(), nullptr);
  bool right = starts[0] == 0 && starts[p.k] == nnz;
  for (int64_t c = 0; c < p.k; ++c) {
    for (int64_t i = starts[c]; i < starts[c + 1]; ++i) {
      const int64_t row = rows[i];
      right &=
          sorted[i] == c && packed.row_ptr[row] <= perm[i] && perm[i] < packed.row_ptr[row + 1];
    }
  }
  expect(right, p.name("transpose"));
}

void run(const Problem& p) {
  const Packed packed = pack(p);
  check_pack(p, packed);
  check_mask(p);
  check_transpose(p, packed);
  const Strided<float> x{p.x.data(), p.k, 1};
  std::vector<float> y(p.batch * p.n, NAN);
  const Epilogue<float> epilogue{y.data(), nullptr, p.n, Activation::none};
  const int64_t width = csr_panel_width(p.batch);
  std::vector<float> panels(width ? panel_count(p.batch, width) * width * p.k : 0);
  const Csr<float> csr{packed.values.data(),
                       {packed.columns.data(), false},
                       packed.row_ptr.data(),
                       packed.row_order.data(),
                       p.n,
                       p.k};
  launch_csr(x, panels.data(), p.batch, csr, epilogue, nullptr);
  check_products(p, y, "csr");
  y.assign(y.size(), NAN);
  const Bitmap<float> bitmap{
      packed.values.data(), packed.words.data(),          packed.row_ptr.data(), p.n, p.k,
      packed.words_per_row, packed.words_per_row % 4 == 0};
  launch_bitmap(x, p.batch, bitmap, epilogue, nullptr);
  check_products(p, y, "bitmap");
  const int64_t padded = panel_count(p.batch, kWarp) * kWarp;
  std::vector<float> grad_panels(padded * p.n), x_panels(padded * p.k);
  std::vector<float> dot(packed.values.size(), NAN);
  launch_sampled({p.grad.data(), p.n, 1}, x, grad_panels.data(), x_panels.data(), p.batch,
                 {{packed.columns.data(), false}, packed.row_ptr.data(), p.n, p.k}, dot.data(),
                 nullptr);
  check_sampled(p, packed, dot);
}

// One block for all tiles, as where there are more of them than a grid may have blocks.
void check_panels_of_one_block(const Problem& p) {
  const int64_t padded = panel_count(p.batch, kWarp) * kWarp;
  std::vector<float> panels(padded * p.k, NAN);
  auto kernel = panel_kernel<float, kWarp>;
  SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, nullptr, Strided<float>{p.x.data(), p.k, 1}, p.batch, p.k,
                 panels.data());
  bool right = true;
  for (int64_t b = 0; b < padded; ++b) {
    for (int64_t c = 0; c < p.k; ++c) {
      const float wanted = b < p.batch ? p.x[b * p.k + c] : 0.0f;
      right &= panels[(b / kWarp * p.k + c) * kWarp + b % kWarp] == wanted;
    }
  }
  expect(right, p.name("panels"));
}

void check_row_order_of_one_block(int64_t n) {
  std::mt19937 random(5);
  std::vector<int64_t> row_ptr{0};
  for (int64_t row = 0; row < n; ++row) {
    row_ptr.push_back(row_ptr.back() + std::uniform_int_distribution<int64_t>(0, 9)(random));
  }
  std::vector<int32_t> order(n, -1), wanted(n);
  SAPWOOD_LAUNCH(row_order_kernel<>, 1, kThreads, 0, nullptr, row_ptr.data(), n, order.data());
  std::iota(wanted.begin(), wanted.end(), 0);
  const auto longer = [&](int32_t a, int32_t b) {
    return row_ptr[a + 1] - row_ptr[a] > row_ptr[b + 1] - row_ptr[b];
  };
  for (int64_t first = 0; first < n; first += kOrderChunk) {
    std::stable_sort(wanted.begin() + first,
                     wanted.begin() + std::min<int64_t>(first + kOrderChunk, n), longer);
  }
  expect(order == wanted, "row order of " + std::to_string(n));
}

}  // namespace

int main() {
  check_panels_of_one_block({40, 2, 70, 0.5});
  check_row_order_of_one_block(300);
  run({1, 5, 37, 0.5});
  run({3, 18, 64, 0.3});
  run({8, 9, 130, 0.9});
  run({17, 33, 40, 0.2});
  run({70, 6, 65, 1.0});
  run({2, 4, 16, 0.0});
  std::printf("%s\n", failures ? "failed" : "ok");
  return failures != 0;
}
