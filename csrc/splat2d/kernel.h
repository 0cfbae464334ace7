// Sums of 2D Gaussians. The ladder of splat2d, each rung with what it gains over the one before
// (256 x 256, N = 2500, fp32, one AVX-512 core; README.md has the figures):
//   1 naive      every Gaussian at every pixel, in double: the oracle of the tests
//   2 spans      only the rows and columns that the ellipse q <= cutoff can reach
//   3 bands      16 rows of the image at a time in a buffer that stays in cache; the spans of 16 rows
//                are solved as one vector
//   4 columns    a block of lanes walks down its rows: u is constant there, and a pixel costs two
//                operations for q, seven for the exponential and one per channel
// The backward pass walks the same blocks per Gaussian and keeps all sums in registers: nothing is
// added to memory by two Gaussians, so there are no atomics, and results do not depend on threads.
//
// With L = [[l1, 0], [l2, l3]], u = dx / l1, v = (dy - l2 u) / l3 and q = u^2 + v^2 the kernels carry
// sqrt(log2(e) / 2) inside u and v, so that a weight is 2^-(u^2 + v^2).
// No torch header here; nothing allocates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#pragma GCC diagnostic push  // gcc 12 warns of its own header's undefined values
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/simd.h"
#include "splat2d/geometry.h"

namespace sapwood::splat2d {

inline constexpr int kBand = 16;   // rows of a band, and of a group whose spans are solved at once
inline constexpr int kPad = 16;    // readable and writable elements after a row: a block at its end
inline constexpr int kChunk = 64;  // Gaussians of one task of the backward pass

// Elements from one row of a padded image to the next.
inline int64_t padded(int64_t width) {
  return width + kPad;
}

// The rows of a band, channels one after another: element (r, c, x) at (r * channels + c) * pitch + x.
template <class T>
struct Band {
  T* pixels;
  int64_t first, rows;  // of the image
  int64_t width, pitch, channels;
};

// The gradient of an image in rows as those of a band.
template <class T>
struct Gradient {
  const T* pixels;
  int64_t height, width, pitch, channels;
  bool finite;  // whether every element is
};

// Where the derivatives of one Gaussian go; abs_mu may be null.
template <class T>
struct Slopes {
  T *mu, *chol, *feat, *abs_mu;
};

// Rung 1: adds one Gaussian to image (C, H, W).
inline void draw_naive(const double* mu, const double* chol, const double* feat, int64_t channels,
                       int64_t height, int64_t width, double cutoff, double* image) {
  for (int64_t j = 0; j < height; ++j) {
    for (int64_t i = 0; i < width; ++i) {
      const double u = (static_cast<double>(i) - mu[0]) / chol[0];
      const double v = (static_cast<double>(j) - mu[1] - chol[1] * u) / chol[2];
      const double q = u * u + v * v;
      if (!(q <= cutoff)) continue;
      for (int64_t c = 0; c < channels; ++c) {
        image[(c * height + j) * width + i] += std::exp(-q / 2) * feat[c];
      }
    }
  }
}

// Rung 1 of the backward pass: the derivatives of sum(image * grad), for grad (C, H, W).
inline void differentiate_naive(const double* mu, const double* chol, const double* feat,
                                int64_t channels, int64_t height, int64_t width, double cutoff,
                                const double* grad, Slopes<double> to) {
  const double k = chol[1] / chol[2];
  std::fill_n(to.mu, 2, 0.0);
  std::fill_n(to.chol, 3, 0.0);
  std::fill_n(to.feat, channels, 0.0);
  std::fill_n(to.abs_mu, 2, 0.0);
  for (int64_t j = 0; j < height; ++j) {
    for (int64_t i = 0; i < width; ++i) {
      const double u = (static_cast<double>(i) - mu[0]) / chol[0];
      const double v = (static_cast<double>(j) - mu[1] - chol[1] * u) / chol[2];
      const double q = u * u + v * v, w = std::exp(-q / 2);
      if (!(q <= cutoff)) continue;
      double s = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const double g = grad[(c * height + j) * width + i];
        s += w * g * feat[c];
        to.feat[c] += w * g;
      }
      const double x = s * (u - k * v) / chol[0], y = s * v / chol[2];
      to.mu[0] += x;
      to.mu[1] += y;
      to.abs_mu[0] += std::abs(x);
      to.abs_mu[1] += std::abs(y);
      to.chol[0] += s * u * (u - k * v) / chol[0];
      to.chol[1] += s * u * v / chol[2];
      to.chol[2] += s * v * v / chol[2];
    }
  }
}

}  // namespace sapwood::splat2d

#define SAPWOOD_KERNEL_FILE "splat2d/kernel_vector.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "splat2d/kernel_forward.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "splat2d/kernel_backward.inl"
#include "common/foreach_isa.h"
