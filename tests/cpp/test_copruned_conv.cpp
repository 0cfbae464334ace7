// The kernels of copruned_conv against the naive version in double, for every instruction set this
// CPU has: windows, register tiles of both directions, depthwise lines. Torch-free; pixels are split
// over two threads so that TSan sees how they share memory.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "copruned_conv/kernel.h"
#include "expect.h"

namespace {

using namespace sapwood::copruned_conv;

// The functions of one instruction set as a type, so that a test is written once.
#define KERNELS(Name, isa_namespace, label)       \
  struct Name {                                   \
    static constexpr const char* name = label;    \
    template <class T>                            \
    static int64_t filters() {                    \
      int64_t width = 0;                          \
      isa_namespace::tile_filters<T>(width);      \
      return width;                               \
    }                                             \
    template <class T>                            \
    static int64_t width(int64_t filters) {       \
      int64_t width = 0;                          \
      isa_namespace::width_of<T>(filters, width); \
      return width;                               \
    }                                             \
    template <class... A>                         \
    static void load(A&&... a) {                  \
      isa_namespace::load_window(a...);           \
    }                                             \
    template <class... A>                         \
    static void pack(A&&... a) {                  \
      isa_namespace::pack_weight_rows(a...);      \
    }                                             \
    template <class... A>                         \
    static void multiply(A&&... a) {              \
      isa_namespace::multiply(a...);              \
    }                                             \
    template <class... A>                         \
    static void gradient(A&&... a) {              \
      isa_namespace::gradient(a...);              \
    }                                             \
    template <class... A>                         \
    static void depthwise(A&&... a) {             \
      isa_namespace::multiply_depthwise(a...);    \
    }                                             \
  };
KERNELS(Base, isa_base, "base")
#if defined(__x86_64__)
KERNELS(Avx2, isa_avx2, "avx2")
KERNELS(Avx512, isa_avx512, "avx512")
#endif

template <class T>
std::vector<T> random_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(count));
  for (T& v : values) v = static_cast<T>(normal(random));
  return values;
}

// An image of 9 x 7 pixels, all of whose outputs lie in one window.
template <class T>
struct Problem {
  Problem(int64_t channels, int64_t filters, Geometry g)
      : channels(channels),
        filters(filters),
        geometry(g),
        taps(forward_taps(g)),
        out_rows(g.output_size(0, rows)),
        out_cols(g.output_size(1, cols)),
        window_rows((out_rows - 1) * g.stride[0] + taps.bottom - taps.top + 1),
        window_cols((out_cols - 1) * g.stride[1] + taps.right - taps.left + 1),
        x(random_values<T>(rows * cols * channels, 1)),
        w(random_values<T>(filters * channels * g.taps(), 2)) {
    for (int64_t i = 0; i < out_rows; ++i) {
      for (int64_t j = 0; j < out_cols; ++j) {
        offsets.push_back(
            static_cast<int32_t>((i * g.stride[0] * window_cols + j * g.stride[1]) * kLine));
      }
    }
    offsets.insert(offsets.end(), kMaxPixels, offsets[0]);  // what a register tile may read
    for (int64_t t = 0; t < taps.count; ++t) {
      shifts.push_back(static_cast<int32_t>(
          ((taps.dy[t] - taps.top) * window_cols + taps.dx[t] - taps.left) * kLine));
    }
  }

  static constexpr int64_t rows = 9, cols = 7;
  int64_t channels, filters;
  Geometry geometry;
  Taps taps;
  int64_t out_rows, out_cols, window_rows, window_cols;
  std::vector<T> x, w;
  std::vector<int32_t> offsets, shifts;

  int64_t pixels() const { return out_rows * out_cols; }
  int64_t padded() const { return static_cast<int64_t>(offsets.size()); }
  int64_t plane() const { return window_rows * window_cols * kLine; }

  template <class K>
  std::vector<T> windows(const std::vector<Block>& blocks) const {
    std::vector<T> out(static_cast<size_t>(plane()) * blocks.size(), T(NAN));
    const Image<T> image{x.data(), rows, cols, channels, nullptr, 1};
    K::load(image, int64_t{taps.top}, int64_t{taps.left}, window_rows, window_cols, blocks.data(),
            static_cast<int64_t>(blocks.size()), plane(), out.data());
    return out;
  }
};

template <class T>
bool near(double actual, double expected) {
  const double eps = sizeof(T) == 8 ? 1e-12 : 1e-4;
  return std::abs(actual - expected) <= eps * (1 + std::abs(expected));
}

// Filters `first` to `last` with the input groups of 8 in `on`.
template <class K, class T>
void check_multiply(const Problem<T>& p, const bool* on, const Block& outputs) {
  const std::vector<Block> inputs = blocks_of(on, 8, p.channels, kLine);
  const std::vector<T> windows = p.template windows<K>(inputs);
  std::vector<T> by_tap(p.w.size());  // (taps, channels, filters)
  for (int64_t t = 0; t < p.taps.count; ++t) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t k = 0; k < p.filters; ++k) {
        by_tap[static_cast<size_t>((t * p.channels + c) * p.filters + k)] =
            p.w[static_cast<size_t>((k * p.channels + c) * p.taps.count + t)];
      }
    }
  }
  const int64_t width = K::template width<T>(outputs.count);
  std::vector<Segment> segments;
  std::vector<T> weights;
  for (size_t b = 0; b < inputs.size(); ++b) {
    for (int64_t t = 0; t < p.taps.count; ++t) {
      segments.push_back({static_cast<int32_t>(static_cast<int64_t>(b) * p.plane()) +
                              p.shifts[static_cast<size_t>(t)],
                          inputs[b].count});
      const size_t at = weights.size();
      weights.resize(at + static_cast<size_t>(inputs[b].count * width));
      K::pack(by_tap.data() + t * p.channels * p.filters, p.filters, int64_t{0}, inputs[b], outputs,
              width, weights.data() + at);
    }
  }
  const std::vector<T> bias(static_cast<size_t>(kMaxFilters), T(0.5));
  std::vector<T> sums(static_cast<size_t>(p.padded() * width));
  const int64_t half = p.pixels() / 2 / 24 * 24;  // whole tiles of every instruction set
  const auto run = [&](int64_t first, int64_t count) {
    Ahead ahead{nullptr, nullptr, 0};
    K::multiply(width, windows.data(), p.offsets.data() + first, count,
                static_cast<const Segment*>(segments.data()), static_cast<int64_t>(segments.size()),
                static_cast<const T*>(weights.data()), static_cast<const T*>(bias.data()),
                sums.data() + first * width, ahead);
  };
  std::thread other([&] { run(0, half); });
  run(half, p.pixels() - half);
  other.join();
  bool good = true;
  for (int64_t i = 0; i < p.pixels(); ++i) {
    int64_t at = 0;
    for (int32_t r = 0; r < outputs.runs; ++r) {
      for (int32_t k = 0; k < outputs.run[r].count; ++k, ++at) {
        const double exact =
            0.5 + output_naive(p.x.data(), p.w.data(), p.geometry, p.rows, p.cols, p.channels, on,
                               8, -1, outputs.run[r].first + k, i / p.out_cols, i % p.out_cols);
        good &= near<T>(sums[static_cast<size_t>(i * width + at)], exact);
      }
    }
  }
  expect(good, std::string("multiply ") + K::name);
}

// The gradient of all weights for slopes of one filter block.
template <class K, class T>
void check_gradient(const Problem<T>& p) {
  const int64_t width = K::template filters<T>();
  const Block inputs = block_at(nullptr, 8, p.channels, 0, kLine);
  const std::vector<T> windows = p.template windows<K>({inputs});
  const std::vector<T> slopes = random_values<T>(p.pixels() * width, 3);
  std::vector<T> sums(static_cast<size_t>(p.taps.count * kLine * width));
  K::gradient(width, windows.data(), p.offsets.data(), p.pixels(), p.shifts.data(), p.taps.count,
              slopes.data(), sums.data());
  bool good = true;
  for (int64_t t = 0; t < p.taps.count; ++t) {
    for (int64_t c = 0; c < inputs.count; ++c) {
      for (int64_t k = 0; k < width; ++k) {
        double exact = 0;
        for (int64_t i = 0; i < p.pixels(); ++i) {
          const int64_t y = i / p.out_cols * p.geometry.stride[0] + p.taps.dy[t];
          const int64_t z = i % p.out_cols * p.geometry.stride[1] + p.taps.dx[t];
          if (y < 0 || y >= p.rows || z < 0 || z >= p.cols) continue;
          exact += static_cast<double>(slopes[static_cast<size_t>(i * width + k)]) *
                   static_cast<double>(p.x[static_cast<size_t>((y * p.cols + z) * p.channels + c)]);
        }
        good &= near<T>(sums[static_cast<size_t>((t * kLine + c) * width + k)], exact);
      }
    }
  }
  expect(good, std::string("gradient ") + K::name);
}

template <class K, class T>
void check_depthwise(const Problem<T>& p) {
  const Block block = block_at(nullptr, 8, p.channels, 0, kLine);
  const std::vector<T> windows = p.template windows<K>({block});
  std::vector<T> weights(static_cast<size_t>(p.taps.count * kLine)), bias(kLine, T(-0.25));
  const std::vector<T> w = random_values<T>(p.channels * p.taps.count, 4);
  for (int64_t t = 0; t < p.taps.count; ++t) {
    for (int64_t c = 0; c < block.count; ++c) {
      weights[static_cast<size_t>(t * kLine + c)] = w[static_cast<size_t>(c * p.taps.count + t)];
    }
  }
  TapShifts taps{p.shifts.data(), p.taps.count, 0, 0, kLine};
  for (const bool rows : {false, true}) {
    if (rows) taps.columns = p.taps.regular_columns(&taps.spacing);
    std::vector<T> sums(static_cast<size_t>(p.padded() * kLine));
    K::depthwise(windows.data(), p.offsets.data(), p.pixels(), taps, weights.data(), bias.data(),
                 sums.data());
    bool good = true;
    for (int64_t i = 0; i < p.pixels(); ++i) {
      for (int64_t c = 0; c < block.count; ++c) {
        const double exact =
            -0.25 + output_naive(p.x.data(), w.data(), p.geometry, p.rows, p.cols, p.channels,
                                 nullptr, 8, c, c, i / p.out_cols, i % p.out_cols);
        good &= near<T>(sums[static_cast<size_t>(i * kLine + c)], exact);
      }
    }
    expect(good, std::string("depthwise ") + K::name);
  }
}

template <class K, class T>
void check_all() {
  const Geometry geometries[] = {{{3, 3}, {1, 1}, {1, 1}, {1, 1}},
                                 {{5, 3}, {1, 1}, {2, 2}, {1, 2}},
                                 {{7, 7}, {1, 1}, {9, 9}, {3, 3}},
                                 {{3, 3}, {2, 2}, {1, 1}, {1, 1}},
                                 {{1, 1}, {1, 2}, {0, 0}, {1, 1}}};
  const bool some[] = {true, false, true, true}, none[] = {false, false, false, false};
  for (const Geometry& g : geometries) {
    const Problem<T> wide(32, 48, g), narrow(13, 5, g);
    const int64_t width = K::template filters<T>();
    for (const bool* on : {static_cast<const bool*>(nullptr), some, none}) {
      for (const Block& outputs : blocks_of(on, 8, 32, width)) {
        check_multiply<K>(wide, on, outputs);
      }
    }
    for (const Block& outputs : blocks_of(nullptr, 8, 5, width)) {
      check_multiply<K>(narrow, nullptr, outputs);
    }
    check_gradient<K>(wide);
    check_gradient<K>(narrow);
    check_depthwise<K>(wide);
    check_depthwise<K>(narrow);
  }
}

template <class K>
void check_isa() {
  check_all<K, float>();
  check_all<K, double>();
}

}  // namespace

int main() {
  check_isa<Base>();
#if defined(__x86_64__)
  if (sapwood::detail::best_isa() != sapwood::Isa::base) check_isa<Avx2>();
  if (sapwood::detail::best_isa() == sapwood::Isa::avx512) check_isa<Avx512>();
#endif
  if (failures == 0) std::printf("copruned_conv kernels: all checks passed\n");
  return failures == 0 ? 0 : 1;
}
