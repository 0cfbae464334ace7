// The kernels of splat2d against the naive version in double, for every instruction set this CPU has:
// bands, gradients and pixel counts at widths around a vector, with buffers of exactly the padded
// size, so that AddressSanitizer sees a block that leaves its row. Torch-free; bands are drawn by two
// threads so that TSan sees what they share.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "splat2d/kernel.h"

namespace {

using namespace sapwood::splat2d;

// The functions of one instruction set as a type, so that a test is written once.
#define KERNELS(Name, isa_namespace, label)    \
  struct Name {                                \
    static constexpr const char* name = label; \
    template <class... A>                      \
    static void prepare(A&&... a) {            \
      isa_namespace::prepare_all(a...);        \
    }                                          \
    template <class... A>                      \
    static void draw(A&&... a) {               \
      isa_namespace::draw_all(a...);           \
    }                                          \
    template <class... A>                      \
    static void copy(A&&... a) {               \
      isa_namespace::copy_row(a...);           \
    }                                          \
    template <class... A>                      \
    static void differentiate(A&&... a) {      \
      isa_namespace::differentiate(a...);      \
    }                                          \
    template <class... A>                      \
    static void count(A&&... a) {              \
      isa_namespace::count_pixels(a...);       \
    }                                          \
  };
KERNELS(Base, isa_base, "base")
#if defined(__x86_64__)
KERNELS(Avx2, isa_avx2, "avx2")
KERNELS(Avx512, isa_avx512, "avx512")
#endif

// Gaussians of all shapes, some beyond the border.
template <class T>
struct Scene {
  Scene(int64_t n, int64_t channels, int64_t height, int64_t width, double cutoff)
      : n(n), channels(channels), height(height), width(width), cut(Cut::of<T>(cutoff)) {
    std::mt19937 random(static_cast<unsigned>(1000 * height + 10 * width + channels));
    std::normal_distribution<double> normal;
    const auto uniform = [&](double most) {
      return std::uniform_real_distribution<double>(-2, most + 2)(random);
    };
    for (int64_t i = 0; i < n; ++i) {
      mu.push_back(static_cast<T>(uniform(static_cast<double>(width))));
      mu.push_back(static_cast<T>(uniform(static_cast<double>(height))));
      chol.push_back(static_cast<T>(2 * std::exp(0.5 * normal(random))));
      chol.push_back(static_cast<T>(normal(random)));
      chol.push_back(static_cast<T>(2 * std::exp(0.5 * normal(random))));
      for (int64_t c = 0; c < channels; ++c) feat.push_back(static_cast<T>(normal(random)));
    }
    for (int64_t p = 0; p < channels * height * width; ++p) {
      grad.push_back(static_cast<T>(normal(random)));
    }
  }

  int64_t n, channels, height, width;
  Cut cut;
  std::vector<T> mu, chol, feat, grad;
};

template <class T>
std::vector<double> widened(const std::vector<T>& v) {
  return std::vector<double>(v.begin(), v.end());
}

// Weights jump by exp(-cutoff / 2) at the border of the cut, so the scenes here have a cut where the
// jump is below the tolerance.
template <class T>
constexpr double kCutoff = sizeof(T) == 8 ? 80.0 : 40.0;
template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-12 : 2e-5;

template <class T>
void expect_close(const std::vector<double>& got, const std::vector<double>& wanted,
                  const std::string& what) {
  double error = 0, size = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    error = std::max(error, std::abs(got[i] - wanted[i]));
    size = std::max(size, std::abs(wanted[i]));
    if (got[i] != got[i]) error = HUGE_VAL;
  }
  expect(error <= kTolerance<T> * size, what + ": off by " + std::to_string(error));
}

template <class Kernels, class T>
std::vector<Gaussian<T>> prepared(const Scene<T>& s) {
  std::vector<Gaussian<T>> gaussians(static_cast<size_t>(s.n));
  const int64_t zero = 0;
  Kernels::prepare(s.mu.data(), s.chol.data(), zero, s.n, s.n, s.height, s.width, s.cut,
                   gaussians.data());
  return gaussians;
}

template <class Kernels, class T>
void test_image(const Scene<T>& s, const std::string& what) {
  const std::vector<double> mu = widened(s.mu), chol = widened(s.chol), feat = widened(s.feat);
  std::vector<double> wanted(static_cast<size_t>(s.channels * s.height * s.width), 0.0);
  for (int64_t i = 0; i < s.n; ++i) {
    draw_naive(&mu[static_cast<size_t>(2 * i)], &chol[static_cast<size_t>(3 * i)],
               &feat[static_cast<size_t>(s.channels * i)], s.channels, s.height, s.width,
               s.cut.limit, wanted.data());
  }
  const std::vector<Gaussian<T>> gaussians = prepared<Kernels>(s);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < s.n; ++i) ids.push_back(static_cast<int32_t>(i));
  std::vector<double> got(wanted.size(), -1.0);
  const auto draw_bands = [&](int64_t parity) {
    for (int64_t b = parity; b * kBand < s.height; b += 2) {
      std::vector<T> pixels(static_cast<size_t>(kBand * s.channels * padded(s.width)), T(0));
      const int64_t first = b * kBand;
      const Band<T> band{pixels.data(), first,           std::min<int64_t>(kBand, s.height - first),
                         s.width,       padded(s.width), s.channels};
      Kernels::draw(gaussians.data(), s.feat.data(), ids.data(), s.n, band);
      for (int64_t r = 0; r < band.rows; ++r) {
        for (int64_t c = 0; c < s.channels; ++c) {
          for (int64_t x = 0; x < s.width; ++x) {
            got[static_cast<size_t>((c * s.height + first + r) * s.width + x)] =
                pixels[static_cast<size_t>((r * s.channels + c) * band.pitch + x)];
          }
        }
      }
    }
  };
  std::thread other(draw_bands, 1);
  draw_bands(0);
  other.join();
  expect_close<T>(got, wanted, what + " image");
}

template <class Kernels, class T>
void test_gradients(const Scene<T>& s, bool stats, const std::string& what) {
  const std::vector<double> mu = widened(s.mu), chol = widened(s.chol), feat = widened(s.feat);
  const std::vector<double> grad = widened(s.grad);
  const std::vector<Gaussian<T>> gaussians = prepared<Kernels>(s);
  const int64_t pitch = padded(s.width);
  std::vector<T> rows(static_cast<size_t>(s.height * s.channels * pitch));
  bool finite = true;
  const int64_t one = 1;
  for (int64_t y = 0; y < s.height; ++y) {
    for (int64_t c = 0; c < s.channels; ++c) {
      Kernels::copy(&s.grad[static_cast<size_t>((c * s.height + y) * s.width)], one, s.width,
                    &rows[static_cast<size_t>((y * s.channels + c) * pitch)], finite);
    }
  }
  expect(finite, what + " finite");
  const Gradient<T> image{rows.data(), s.height, s.width, pitch, s.channels, finite};
  struct alignas(64) Line {
    T values[kPad];
  };
  std::vector<Line> scratch(static_cast<size_t>(s.channels));
  const auto channels = static_cast<size_t>(s.channels);
  std::vector<double> got, wanted;
  for (int64_t i = 0; i < s.n; ++i) {
    std::vector<T> found(7 + channels, T(0));
    T* at = found.data();
    const Slopes<T> to{at, at + 2, at + 7, stats ? at + 5 : nullptr};
    Kernels::differentiate(gaussians[static_cast<size_t>(i)],
                           &s.feat[static_cast<size_t>(s.channels * i)], image,
                           scratch.data()->values, to);
    std::vector<double> exact(7 + channels, 0.0), ignored(2);
    const Slopes<double> exact_to{exact.data(), exact.data() + 2, exact.data() + 7,
                                  stats ? exact.data() + 5 : ignored.data()};
    differentiate_naive(&mu[static_cast<size_t>(2 * i)], &chol[static_cast<size_t>(3 * i)],
                        &feat[static_cast<size_t>(s.channels * i)], s.channels, s.height, s.width,
                        s.cut.limit, grad.data(), exact_to);
    got.insert(got.end(), found.begin(), found.end());
    wanted.insert(wanted.end(), exact.begin(), exact.end());
  }
  expect_close<T>(got, wanted, what + " gradients");
}

template <class Kernels, class T>
void test_counts(const Scene<T>& s, const std::string& what) {
  const std::vector<Gaussian<T>> gaussians = prepared<Kernels>(s);
  int64_t found = 0, wanted = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    Kernels::count(gaussians[static_cast<size_t>(i)], s.width, found);
    const auto at = static_cast<size_t>(i);
    for (int64_t y = 0; y < s.height; ++y) {
      for (int64_t x = 0; x < s.width; ++x) {
        const double u = (static_cast<double>(x) - static_cast<double>(s.mu[2 * at])) /
                         static_cast<double>(s.chol[3 * at]);
        const double v = (static_cast<double>(y) - static_cast<double>(s.mu[2 * at + 1]) -
                          static_cast<double>(s.chol[3 * at + 1]) * u) /
                         static_cast<double>(s.chol[3 * at + 2]);
        wanted += u * u + v * v <= s.cut.limit;
      }
    }
  }
  const int64_t doubtful = 1 + wanted / 10000;  // pairs that rounding puts across the border
  expect(std::abs(found - wanted) <= doubtful, what + " counts");
}

template <class Kernels, class T>
void test_all() {
  const int64_t heights[] = {1, 15, 16, 17, 40}, widths[] = {1, 7, 8, 15, 16, 17, 33, 70};
  for (const int64_t height : heights) {
    for (const int64_t width : widths) {
      const int64_t channels = (height + width) % 5 + 1;
      const Scene<T> scene(25, channels, height, width, kCutoff<T>);
      const std::string what = std::string(Kernels::name) +
                               (sizeof(T) == 8 ? " double " : " float ") + std::to_string(height) +
                               "x" + std::to_string(width);
      test_image<Kernels>(scene, what);
      test_gradients<Kernels>(scene, height % 2 == 0, what);
      test_counts<Kernels>(scene, what);
    }
  }
}

template <class Kernels>
void test_types() {
  test_all<Kernels, float>();
  test_all<Kernels, double>();
}

}  // namespace

int main() {
  test_types<Base>();
#if defined(__x86_64__)
  if (sapwood::isa() >= sapwood::Isa::avx2) test_types<Avx2>();
  if (sapwood::isa() >= sapwood::Isa::avx512) test_types<Avx512>();
#endif
  if (failures == 0) std::printf("all passed\n");
  return failures == 0 ? 0 : 1;
}
