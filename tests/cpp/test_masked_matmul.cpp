// The kernels of masked_matmul against the naive version in double, for every instruction set this
// CPU has. Torch-free; rows are split over two threads so that TSan sees how they share memory.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "masked_matmul/kernel.h"
#include "masked_matmul/pack.h"

namespace {

using namespace sapwood::masked_matmul;

// The functions of one instruction set as a type, so that a test is written once.
#define KERNELS(Name, isa_namespace, label)    \
  struct Name {                                \
    static constexpr const char* name = label; \
    template <class... A>                      \
    static void fill(A... a) {                 \
      isa_namespace::fill_panel(a...);         \
    }                                          \
    template <class... A>                      \
    static void csr(A... a) {                  \
      isa_namespace::csr_chunk_of(a...);       \
    }                                          \
    template <class... A>                      \
    static void bitmap(A... a) {               \
      isa_namespace::bitmap_chunk_of(a...);    \
    }                                          \
    template <class... A>                      \
    static void store(A... a) {                \
      isa_namespace::store_sums(a...);         \
    }                                          \
    template <class... A>                      \
    static void sell(A... a) {                 \
      isa_namespace::sell_slice(a...);         \
    }                                          \
    template <class... A>                      \
    static void schedule(A... a) {             \
      isa_namespace::schedule_slice(a...);     \
    }                                          \
    template <class... A>                      \
    static void sampled(A... a) {              \
      isa_namespace::sampled_rows_of(a...);    \
    }                                          \
    template <class... A>                      \
    static void mask(A... a) {                 \
      isa_namespace::apply_mask(a...);         \
    }                                          \
  };
KERNELS(Base, isa_base, "base")
#if defined(__x86_64__)
KERNELS(Avx2, isa_avx2, "avx2")
KERNELS(Avx512, isa_avx512, "avx512")
#endif

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
struct Problem {
  int64_t b, n, k;
  std::vector<T> x, weight, bias, values;
  std::vector<uint8_t> mask;
  std::vector<uint16_t> cols, words;
  std::vector<int64_t> row_ptr;
  std::vector<int32_t> order;
  std::vector<double> expected, magnitude;  // (B, N): y, and sum |w x| + |bias|

  Problem(int64_t b_, int64_t n_, int64_t k_, double sparsity, unsigned seed)
      : b(b_),
        n(n_),
        k(k_),
        x(b * k),
        weight(n * k),
        bias(n),
        mask(n * k),
        row_ptr(n + 1),
        order(n),
        expected(b * n),
        magnitude(b * n) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    for (T& v : x) v = static_cast<T>(normal(random));
    for (T& v : bias) v = static_cast<T>(normal(random));
    for (int64_t i = 0; i < n * k; ++i) {
      const int64_t row = i / std::max<int64_t>(1, k);
      mask[i] = row % 7 == 3 ? 0 : row % 7 == 5 ? 1 : uniform(random) >= sparsity;
      weight[i] = mask[i] ? static_cast<T>(normal(random)) : std::numeric_limits<T>::quiet_NaN();
    }
    pack();
    masked_matmul_naive(x.data(), weight.data(), mask.data(), bias.data(), expected.data(), b, n,
                        k);
    std::vector<T> ax = x, aw = weight, ab = bias;
    for (auto* v : {&ax, &aw, &ab})
      for (T& e : *v) e = std::abs(e);
    masked_matmul_naive(ax.data(), aw.data(), mask.data(), ab.data(), magnitude.data(), b, n, k);
  }

  void pack() {
    using Bits = BitsOf<T>;
    count_rows(mask.data(), k, 0, n, row_ptr.data() + 1);
    counts_to_ends(row_ptr.data(), n);
    order_rows(row_ptr.data(), n, order.data());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = order[i], before = i % kChunkRows == 0 ? row : order[i - 1];
      expect(row / kChunkRows == i / kChunkRows &&
                 row_ptr[before + 1] - row_ptr[before] >= row_ptr[row + 1] - row_ptr[row],
             "order_rows sorts inside chunks");
    }
    values.resize(row_ptr[n]);
    cols.resize(row_ptr[n]);
    std::vector<T> row_values(k + 1);
    std::vector<uint16_t> row_cols(k + 1);
    words.resize(n * ((k + 15) / 16));
    for (int64_t r = 0; r < n; ++r) {
      const int64_t count =
          compact_row(reinterpret_cast<const Bits*>(weight.data()) + r * k, mask.data() + r * k, k,
                      reinterpret_cast<Bits*>(row_values.data()), row_cols.data());
      expect(count == row_ptr[r + 1] - row_ptr[r], "compact_row counts as count_rows");
      std::copy_n(row_values.data(), count, values.data() + row_ptr[r]);
      std::copy_n(row_cols.data(), count, cols.data() + row_ptr[r]);
      pack_words(mask.data() + r * k, k, words.data() + r * ((k + 15) / 16));
    }
  }

  Csr<T, uint16_t> csr() const { return {values.data(), cols.data(), row_ptr.data(), n, k}; }
  Bitmap<T> bitmap() const { return {values.data(), words.data(), row_ptr.data(), n, k}; }

  // Rounding of a sum of at most K + 1 terms, in any order.
  void check(const std::vector<T>& y, const std::string& what) const {
    for (int64_t i = 0; i < b * n; ++i) {
      const double bound =
          4.0 * static_cast<double>(k + 1) * std::numeric_limits<T>::epsilon() * magnitude[i];
      if (!(std::abs(y[i] - expected[i]) <= bound)) {
        return expect(false, what + ": y[" + std::to_string(i) + "] = " + std::to_string(y[i]) +
                                 ", expected " + std::to_string(expected[i]));
      }
    }
  }
};

// f(first, rows) over blocks of `block` rows, odd blocks on a second thread.
template <class F>
void two_threads(int64_t n, int64_t block, const F& f) {
  const auto half = [&](int64_t parity) {
    for (int64_t first = parity * block; first < n; first += 2 * block) {
      f(first, std::min(block, n - first));
    }
  };
  std::thread other(half, 1);
  half(0);
  other.join();
}

template <class K, class T>
void test_panels(const Problem<T>& p, int64_t width, const std::string& what) {
  const Output<T> none{nullptr, p.n, p.bias.data(), Activation::none};
  std::vector<T> y_csr(p.b * p.n), y_bitmap(p.b * p.n), panel(p.k * width);
  for (int64_t b0 = 0; b0 < p.b; b0 += width) {
    const int64_t batch = std::min(width, p.b - b0);
    K::fill(p.x.data() + b0 * p.k, p.k, batch, int64_t{0}, p.k, panel.data(), width);
    two_threads(p.n, kChunkRows, [&](int64_t first, int64_t rows) {
      std::vector<T> sums(kChunkRows * width), scratch(p.k);
      std::vector<int32_t> cols(p.k + kWordBits);
      Output<T> out = none;
      out.y = y_csr.data();
      K::csr(p.csr(), first, rows, panel.data(), width, sums.data(), scratch.data());
      K::store(sums.data(), width, rows, first, b0, batch, out);
      out.y = y_bitmap.data();
      K::bitmap(p.bitmap(), first, rows, panel.data(), width, sums.data(), cols.data(),
                scratch.data());
      K::store(sums.data(), width, rows, first, b0, batch, out);
    });
  }
  p.check(y_csr, what + " csr panel " + std::to_string(width));
  p.check(y_bitmap, what + " bitmap panel " + std::to_string(width));
}

template <class K, class T>
void test_sell(const Problem<T>& p, const std::string& what) {
  using Bits = BitsOf<T>;
  const int64_t slices = (p.n + kSliceRows - 1) / kSliceRows, stride = p.k + kWindow + 1;
  std::vector<int64_t> slice_ptr(slices + 1);
  const Bits* packed = reinterpret_cast<const Bits*>(p.values.data());
  const auto schedule = [&](int64_t s, Bits* values, uint8_t* index, int32_t* window) {
    int64_t steps = 0;
    K::schedule(packed, p.cols.data(), p.row_ptr.data() + s * kSliceRows,
                std::min(kSliceRows, p.n - s * kSliceRows), values, index, window, &steps);
    return steps;
  };
  for (int64_t s = 0; s < slices; ++s) {
    slice_ptr[s + 1] = slice_ptr[s] + schedule(s, nullptr, nullptr, nullptr);
  }
  const int64_t steps = slice_ptr[slices];
  std::vector<T> values(steps * kSliceRows);
  std::vector<uint8_t> index(steps * kSliceRows);
  std::vector<int32_t> window(steps);
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t at = slice_ptr[s];
    schedule(s, reinterpret_cast<Bits*>(values.data()) + at * kSliceRows,
             index.data() + at * kSliceRows, window.data() + at);
  }
  int64_t present = 0;
  for (uint8_t i : index) present += i != kAbsent;
  expect(present == p.row_ptr[p.n], what + " sell holds every weight once");

  std::vector<T> x(p.b * stride, std::numeric_limits<T>::infinity());  // padding is never used
  for (int64_t b = 0; b < p.b; ++b) std::copy_n(p.x.data() + b * p.k, p.k, x.data() + b * stride);
  std::vector<T> y(p.b * p.n);
  const Sell<T> w{values.data(), index.data(), window.data(), slice_ptr.data(), p.n, p.k};
  const Output<T> out{y.data(), p.n, p.bias.data(), Activation::none};
  two_threads(p.n, kSliceRows, [&](int64_t first, int64_t) {
    for (int64_t b0 = 0; b0 < p.b; b0 += 4) {
      K::sell(w, first / kSliceRows, static_cast<const T*>(x.data()) + b0 * stride, stride, b0,
              std::min<int64_t>(4, p.b - b0), out);
    }
  });
  p.check(y, what + " sell");
}

template <class K, class T>
void test_sampled(const Problem<T>& p, int64_t width, const std::string& what) {
  std::vector<T> grad(p.b * p.n), panel(p.k * width), grad_panel(p.n * width), out(p.row_ptr[p.n]);
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (T& v : grad) v = static_cast<T>(normal(random));
  for (int64_t b0 = 0; b0 < p.b; b0 += width) {
    const int64_t batch = std::min(width, p.b - b0);
    K::fill(p.x.data() + b0 * p.k, p.k, batch, int64_t{0}, p.k, panel.data(), width);
    K::fill(static_cast<const T*>(grad.data()) + b0 * p.n, p.n, batch, int64_t{0}, p.n,
            grad_panel.data(), width);
    two_threads(p.n, 16, [&](int64_t first, int64_t rows) {
      K::sampled(static_cast<const T*>(grad_panel.data()), static_cast<const T*>(panel.data()),
                 width, p.k, p.cols.data(), p.row_ptr.data(), first, rows, p.row_ptr[p.n], b0 > 0,
                 out.data());
    });
  }
  for (int64_t row = 0; row < p.n; ++row) {
    for (int64_t e = p.row_ptr[row]; e < p.row_ptr[row + 1]; ++e) {
      double sum = 0, magnitude = 0;
      for (int64_t b = 0; b < p.b; ++b) {
        const double term = static_cast<double>(grad[b * p.n + row]) * p.x[b * p.k + p.cols[e]];
        sum += term;
        magnitude += std::abs(term);
      }
      const double bound = 4.0 * p.b * std::numeric_limits<T>::epsilon() * magnitude;
      if (!(std::abs(out[e] - sum) <= bound)) return expect(false, what + " sampled");
    }
  }
}

template <class K, class T>
void test_mask(const Problem<T>& p, const std::string& what) {
  using Bits = BitsOf<T>;
  std::vector<T> out(p.n * p.k);
  K::mask(reinterpret_cast<const Bits*>(p.weight.data()), p.mask.data(),
          reinterpret_cast<Bits*>(out.data()), p.n * p.k);
  bool same = true;
  for (int64_t i = 0; i < p.n * p.k; ++i) same = same && out[i] == (p.mask[i] ? p.weight[i] : T(0));
  expect(same, what + " apply_mask");
}

#if defined(__x86_64__)
template <int B>
void test_small_batch(const Problem<float>& p) {
  const int64_t stride = (p.k + 15) / 16 * 16;
  std::vector<float> x(B * stride), y(p.b * p.n), scratch(4 * p.k);
  for (int64_t b = 0; b < p.b; ++b) std::copy_n(p.x.data() + b * p.k, p.k, x.data() + b * stride);
  const Output<float> out{y.data(), p.n, p.bias.data(), Activation::none};
  isa_avx512::bitmap_rows<B>(p.bitmap(), 0, p.n, x.data(), stride, 0, p.b, scratch.data(), out);
  p.check(y, "avx512 bitmap batch " + std::to_string(B));
}
#endif

template <class K, class T>
void test_kernels(const char* type) {
  const int64_t shapes[][3] = {{1, 1, 1},      {3, 65, 33},    {16, 64, 64},
                               {17, 130, 100}, {64, 129, 257}, {70, 40, 515},
                               {5, 300, 130},  {2, 9, 0},      {66, 8, 2500}};
  for (const auto& shape : shapes) {
    for (double sparsity : {0.0, 0.5, 0.9, 1.0}) {
      const Problem<T> p(shape[0], shape[1], shape[2], sparsity, 11);
      const std::string what = std::string(K::name) + " " + type + " b" + std::to_string(p.b) +
                               " n" + std::to_string(p.n) + " k" + std::to_string(p.k) + " s" +
                               std::to_string(sparsity);
      for (int64_t width : {16, 32, 64}) {
        test_panels<K>(p, width, what);
        test_sampled<K>(p, width, what);
      }
      test_sell<K>(p, what);
      test_mask<K>(p, what);
    }
  }
}

double ulps(float got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : INFINITY;
  if (std::isinf(want) || std::abs(want) > std::numeric_limits<float>::max()) {
    return got == static_cast<float>(want) ? 0 : INFINITY;
  }
  const double unit = std::max(std::ldexp(1.0, std::ilogb(want) - 23), std::ldexp(1.0, -149));
  return std::abs(got - want) / (want == 0 ? std::ldexp(1.0, -149) : unit);
}

void test_math() {
  namespace math = sapwood::math;
  double worst_exp = 0, worst_log = 0, worst_gelu = 0;
  for (double x = -110; x < 95; x += 0.001) {
    const float f = static_cast<float>(x);
    worst_exp = std::max(worst_exp, ulps(math::exp(f), std::exp(static_cast<double>(f))));
  }
  for (double e = -149; e < 128; e += 0.0007) {
    const float f = static_cast<float>(std::exp2(e));
    worst_log = std::max(worst_log, ulps(math::log(f), std::log(static_cast<double>(f))));
  }
  for (double x = -12; x < 12; x += 0.0003) {
    const float f = static_cast<float>(x);
    const double want = 0.5 * f * std::erfc(-f * std::sqrt(0.5));
    worst_gelu = std::max(worst_gelu, std::abs(math::gelu(f) - want) / (1e-30 + std::abs(want)));
  }
  expect(worst_exp <= 2, "exp within 2 ulp, got " + std::to_string(worst_exp));
  expect(worst_log <= 2, "log within 2 ulp, got " + std::to_string(worst_log));
  expect(worst_gelu <= 2e-5, "gelu relative error, got " + std::to_string(worst_gelu));
  const float inf = INFINITY;
  expect(math::exp(-inf) == 0 && math::exp(inf) == inf && std::isnan(math::exp(NAN)),
         "exp of infinities and NaN");
  expect(math::log(0.0f) == -inf && math::log(inf) == inf && std::isnan(math::log(-1.0f)) &&
             std::isnan(math::log(NAN)) && math::log(1.0f) == 0,
         "log at its borders");
  expect(std::isnan(math::relu(NAN)) && math::relu(-1.0f) == 0, "relu");
}

void test_halves() {
  expect(widen(BFloat16{0x3f80}) == 1.0f && std::isinf(widen(BFloat16{0xff80})), "bfloat16");
  expect(widen(Float16{0x3c00}) == 1.0f && widen(Float16{0x0001}) == std::ldexp(1.0f, -24) &&
             widen(Float16{0xfbff}) == -65504.0f && widen(Float16{0xfc00}) == -INFINITY &&
             std::isnan(widen(Float16{0x7e00})) &&
             widen(Float16{0x03ff}) == 1023 * std::ldexp(1.0f, -24),
         "float16");
}

void test_transpose() {
  const Problem<float> p(1, 77, 53, 0.8, 3);
  const int64_t nnz = p.row_ptr[p.n];
  std::vector<int64_t> column_ptr(p.k + 1), perm(nnz), cursor(p.k);
  std::vector<uint16_t> rows(nnz);
  transpose_structure(p.cols.data(), p.row_ptr.data(), p.n, p.k, column_ptr.data(), rows.data(),
                      perm.data(), cursor.data());
  bool right = column_ptr[p.k] == nnz;
  for (int64_t c = 0; c < p.k; ++c) {
    for (int64_t e = column_ptr[c]; e < column_ptr[c + 1]; ++e) {
      right = right && p.cols[perm[e]] == c && p.row_ptr[rows[e]] <= perm[e] &&
              perm[e] < p.row_ptr[rows[e] + 1] && (e == column_ptr[c] || rows[e - 1] < rows[e]);
    }
  }
  expect(right, "transpose_structure");
}

}  // namespace

int main() {
  test_math();
  test_halves();
  test_transpose();
  test_kernels<Base, float>("float");
  test_kernels<Base, double>("double");
#if defined(__x86_64__)
  if (sapwood::isa() != sapwood::Isa::base) {
    test_kernels<Avx2, float>("float");
    test_kernels<Avx2, double>("double");
  }
  if (sapwood::isa() == sapwood::Isa::avx512) {
    test_kernels<Avx512, float>("float");
    test_kernels<Avx512, double>("double");
    for (double sparsity : {0.0, 0.5, 0.95}) {
      test_small_batch<1>(Problem<float>(1, 131, 200, sparsity, 5));
      test_small_batch<2>(Problem<float>(2, 67, 113, sparsity, 5));
      test_small_batch<4>(Problem<float>(3, 131, 64, sparsity, 5));
      test_small_batch<8>(Problem<float>(8, 33, 500, sparsity, 5));
    }
  }
#endif
  if (failures == 0) std::printf("masked_matmul kernels: all checks passed\n");
  return failures == 0 ? 0 : 1;
}
