// The device kernels of splat2d against the naive version in double. It needs no torch library, so
// ThreadSanitizer can watch every kernel. Some launches have one block for all the work, as where
// there is more of it than a grid may have blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "splat2d/cuda_backward.cuh"
#include "splat2d/cuda_forward.cuh"

namespace {

using namespace sapwood::splat2d;
using namespace sapwood::splat2d::device;

void expect_close(const std::vector<float>& got, const std::vector<double>& wanted,
                  const std::string& what) {
  double error = 0, size = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double off = std::abs(static_cast<double>(got[i]) - wanted[i]);
    error = off <= error ? error : off;  // keeps NaN
    size = std::max(size, std::abs(wanted[i]));
  }
  expect(error <= 2e-5 * size, what + ": off by " + std::to_string(error));
}

// The cut is where the jump of a weight is below the tolerance.
constexpr double kCutoff = 40;

// Gaussians of all shapes, some beyond the border; `height_of` times as tall.
struct Scene {
  Scene(int64_t batch, int64_t n, int64_t channels, int64_t height, int64_t width,
        double height_of = 1)
      : s{batch, n, channels, height, width}, cut(Cut::of<float>(kCutoff)) {
    std::mt19937 random(static_cast<unsigned>(1000 * height + 10 * width + n));
    std::normal_distribution<double> normal;
    const auto uniform = [&](int64_t most) {
      return std::uniform_real_distribution<double>(-2, static_cast<double>(most + 2))(random);
    };
    const auto put = [](std::vector<float>& to, double x) { to.push_back(static_cast<float>(x)); };
    for (int64_t i = 0; i < batch * n; ++i) {
      put(mu, uniform(width));
      put(mu, uniform(height));
      put(chol, 2 * std::exp(0.5 * normal(random)));
      put(chol, normal(random));
      put(chol, 2 * height_of * std::exp(0.5 * normal(random)));
      for (int64_t c = 0; c < channels; ++c) put(feat, normal(random));
    }
    for (int64_t p = 0; p < batch * channels * height * width; ++p) put(grad, normal(random));
    gaussians.resize(static_cast<size_t>(batch * n));
    launch_prepare<float>(mu.data(), chol.data(), nullptr, 0, s, cut, gaussians.data(), nullptr);
  }

  std::string name(const char* what) const {
    return std::string(what) + " of " + std::to_string(s.batch) + "x" + std::to_string(s.n) +
           " on " + std::to_string(s.height) + "x" + std::to_string(s.width);
  }
  // The numbers of Gaussian i, `each` of them, in double.
  static std::vector<double> of(const std::vector<float>& values, int64_t i, int64_t each) {
    const auto first = values.begin() + i * each;
    return {first, first + each};
  }
  // In units of the ellipse's axes.
  double distance(int64_t i, int64_t x, int64_t y) const {
    const std::vector<double> m = of(mu, i, 2), l = of(chol, i, 3);
    const double u = (static_cast<double>(x) - m[0]) / l[0];
    const double v = (static_cast<double>(y) - m[1] - l[1] * u) / l[2];
    return u * u + v * v;
  }

  Shape s;
  Cut cut;
  std::vector<float> mu, chol, feat, grad;
  std::vector<Gaussian<float>> gaussians;
};

// Adds every Gaussian of the batch to images (B, C, H, W).
std::vector<double> image_of(const Scene& scene) {
  const Shape& s = scene.s;
  const int64_t item = s.channels * s.height * s.width;
  std::vector<double> image(static_cast<size_t>(s.batch * item), 0.0);
  for (int64_t i = 0; i < s.batch * s.n; ++i) {
    for (int64_t p = 0; p < s.height * s.width; ++p) {
      const double q = scene.distance(i, p % s.width, p / s.width);
      if (!(q <= scene.cut.limit)) continue;
      for (int64_t c = 0; c < s.channels; ++c) {
        image[i / s.n * item + c * s.height * s.width + p] +=
            std::exp(-q / 2) * scene.feat[i * s.channels + c];
      }
    }
  }
  return image;
}

// Draws in slabs of `step` tiles; with `one_block` each by a single block.
void check_image(const Scene& scene, int64_t step, bool one_block) {
  const Shape& s = scene.s;
  std::vector<float> image(static_cast<size_t>(s.batch * s.channels * s.height * s.width), NAN);
  const int64_t tiles = s.batch * s.tiles();
  for (int64_t first = 0; first < tiles; first += step) {
    const Slab slab{first, std::min(step, tiles - first)};
    std::vector<uint32_t> lists(static_cast<size_t>(slab.count * s.words()), 0);
    launch_mark<float>(scene.gaussians.data(), s, slab, lists.data(), nullptr);
    if (!one_block) {
      launch_draw<float>(scene.gaussians.data(), scene.feat.data(), lists.data(), s, slab,
                         image.data(), nullptr);
      continue;
    }
    auto kernel = draw_kernel<float, 1>;
    for (int64_t channel = 0; channel < s.channels; ++channel) {
      SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, nullptr, scene.gaussians.data(), scene.feat.data(),
                     static_cast<const uint32_t*>(lists.data()), s, slab, channel, image.data());
    }
  }
  expect_close(image, image_of(scene), scene.name("image"));
}

// The derivatives of sum(image * grad), in the order of Outputs.
struct Slopes {
  explicit Slopes(const Shape& s)
      : mu(s.batch * s.n * 2),
        chol(s.batch * s.n * 3),
        feat(s.batch * s.n * s.channels),
        abs_mu(mu.size()) {}
  std::vector<double> mu, chol, feat, abs_mu;
};

Slopes slopes_of(const Scene& scene) {
  const Shape& s = scene.s;
  Slopes to(s);
  for (int64_t i = 0; i < s.batch * s.n; ++i) {
    const std::vector<double> m = Scene::of(scene.mu, i, 2), l = Scene::of(scene.chol, i, 3);
    for (int64_t p = 0; p < s.height * s.width; ++p) {
      const double u = (static_cast<double>(p % s.width) - m[0]) / l[0];
      const double v = (static_cast<double>(p / s.width) - m[1] - l[1] * u) / l[2];
      const double q = u * u + v * v, w = std::exp(-q / 2);
      if (!(q <= scene.cut.limit)) continue;
      double dot = 0;
      for (int64_t c = 0; c < s.channels; ++c) {
        const double g = scene.grad[(i / s.n * s.channels + c) * s.height * s.width + p];
        dot += w * g * scene.feat[i * s.channels + c];
        to.feat[i * s.channels + c] += w * g;
      }
      const double x = dot * (u - l[1] / l[2] * v) / l[0], y = dot * v / l[2];
      to.mu[2 * i] += x;
      to.mu[2 * i + 1] += y;
      to.abs_mu[2 * i] += std::abs(x);
      to.abs_mu[2 * i + 1] += std::abs(y);
      to.chol[3 * i] += u * x;
      to.chol[3 * i + 1] += u * y;
      to.chol[3 * i + 2] += v * y;
    }
  }
  return to;
}

void check_gradients(const Scene& scene, bool one_block) {
  const Shape& s = scene.s;
  const Slopes wanted = slopes_of(scene);
  std::vector<float> mu(wanted.mu.size(), NAN), chol(wanted.chol.size(), NAN);
  std::vector<float> feat(wanted.feat.size(), NAN), abs_mu(wanted.abs_mu.size(), NAN);
  const Inputs<float> in{scene.gaussians.data(), scene.feat.data(), scene.grad.data(), s};
  const Outputs<float> to{mu.data(), chol.data(), feat.data(), abs_mu.data()};
  if (one_block) {
    auto kernel = differentiate_kernel<float, 2, true>;
    SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, nullptr, in, int64_t{0}, to);
  } else {
    launch_differentiate<float>(in, to, nullptr);
  }
  expect_close(mu, wanted.mu, scene.name("d mu"));
  expect_close(chol, wanted.chol, scene.name("d chol"));
  expect_close(feat, wanted.feat, scene.name("d feat"));
  expect_close(abs_mu, wanted.abs_mu, scene.name("|d mu|"));
}

void check_counts(const Scene& scene) {
  const Shape& s = scene.s;
  std::vector<int64_t> totals(static_cast<size_t>(s.batch), 0), wanted(totals.size(), 0);
  launch_count_pixels<float>(scene.gaussians.data(), s, totals.data(), nullptr);
  for (int64_t e = 0; e < s.batch * s.n * s.height * s.width; ++e) {
    const int64_t i = e / (s.height * s.width), p = e % (s.height * s.width);
    wanted[i / s.n] += scene.distance(i, p % s.width, p / s.width) <= scene.cut.limit;
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t doubtful = 1 + wanted[b] / 10000;  // pairs that rounding puts across the border
    expect(std::abs(totals[b] - wanted[b]) <= doubtful, scene.name("count"));
  }
}

}  // namespace

int main() {
  const Scene small(2, 25, 3, 18, 20), many(1, 150, 5, 9, 9);  // a stage holds 128 Gaussians
  const Scene tall(1, 6, 2, 100, 9, 30);  // Gaussians of more rows than a warp takes alone
  check_image(small, small.s.batch * small.s.tiles(), false);
  check_image(small, 3, true);
  check_image(many, 1, false);
  for (const Scene* scene : {&small, &many, &tall}) {
    check_gradients(*scene, false);
    check_counts(*scene);
  }
  check_gradients(tall, true);
  if (failures == 0) std::printf("all device kernels are right\n");
  return failures == 0 ? 0 : 1;
}
