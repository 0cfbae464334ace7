// A Gaussian as the kernels of CPU and GPU read it, and where it can be seen. Solved in double once
// per Gaussian. No torch header here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define SAPWOOD_BOTH __host__ __device__
#define SAPWOOD_FORCE_INLINE inline
#else
#define SAPWOOD_BOTH
#define SAPWOOD_FORCE_INLINE __attribute__((always_inline)) inline
#endif

namespace sapwood::splat2d {

inline constexpr double kScale = 0.84932180028801904272;  // sqrt(log2(e) / 2)

// The largest q that is drawn, and its square root. In T a weight beyond `visible` is below the
// smallest normal number and is taken as 0.
struct Cut {
  double limit, radius;

  template <class T>
  static Cut of(double cutoff) {
    const double visible = 2 * 0.69314718055994530942 * (sizeof(T) == 8 ? 1022 : 126);
    return exactly(cutoff < visible ? cutoff : visible);
  }
  static Cut exactly(double cutoff) { return {cutoff, std::sqrt(cutoff)}; }
};

template <class T>
struct Gaussian {
  T mx, my;
  T per_x, per_y;  // scaled 1 / l1 and 1 / l3
  T skew;          // l2 / l3
  T limit;         // of the scaled u^2 + v^2
  // The columns of a row with e = dy per_y: mx + stretch (skew e +- sqrt(reach - e^2)) +- margin.
  T reach, stretch, margin;
  bool extreme;         // u or v may overflow: every column of a row may be reached
  int32_t top, bottom;  // rows [top, bottom) of the image; none: nothing is drawn
};

template <class T>
inline constexpr double kMost = std::numeric_limits<T>::max();
template <class T>
inline constexpr double kEps = std::numeric_limits<T>::epsilon();

template <class T>
SAPWOOD_BOTH SAPWOOD_FORCE_INLINE T saturated(double x) {
  constexpr double most = kMost<T>;
  return static_cast<T>(x > most ? most : x < -most ? -most : x);
}

SAPWOOD_BOTH SAPWOOD_FORCE_INLINE bool is_number(double x) {
  return x - x == 0;
}

// Whether anything is drawn at all: position and shape finite, l1 and l3 positive.
SAPWOOD_BOTH SAPWOOD_FORCE_INLINE bool is_drawn(double mx, double my, double l1, double l2,
                                                double l3) {
  return is_number(mx) && is_number(my) && is_number(l2) && is_number(l1) && is_number(l3) &&
         l1 > 0 && l3 > 0;
}

SAPWOOD_BOTH SAPWOOD_FORCE_INLINE int32_t clamped_row(double x, double height) {
  return static_cast<int32_t>(x > 0 ? (x < height ? x : height) : 0.0);
}

// Widened by a pixel and by what rounding in T can cost: the test q <= limit decides.
template <class T>
SAPWOOD_BOTH SAPWOOD_FORCE_INLINE Gaussian<T> prepare(const T* mu, const T* chol, int64_t height,
                                                      int64_t width, const Cut& cut) {
  const double mx = static_cast<double>(mu[0]), my = static_cast<double>(mu[1]);
  const double l1 = static_cast<double>(chol[0]), l2 = static_cast<double>(chol[1]);
  const double l3 = static_cast<double>(chol[2]);
  constexpr double eps = kEps<T>;
  Gaussian<T> g{};
  g.mx = mu[0];
  g.my = mu[1];
  if (!is_drawn(mx, my, l1, l2, l3)) return g;
  const double per_y = 1 / l3, k = l2 * per_y, stretch = 1 + k * k;
  g.per_x = saturated<T>(kScale / l1);
  g.per_y = saturated<T>(kScale * per_y);
  g.skew = saturated<T>(k);
  g.limit = static_cast<T>(cut.limit * kScale * kScale);
  const double reach = stretch * cut.limit * (kScale * kScale * (1 + 16 * eps));
  const double side = cut.radius * l1;  // half the width of the ellipse
  const double margin = 1 + 8 * eps * (fabs(mx) + side * (1 + fabs(k)));
  g.reach = saturated<T>(reach);
  g.stretch = saturated<T>(l1 / (kScale * stretch));
  g.margin = saturated<T>(margin);
  constexpr double most = kMost<T> / 4;
  const double h = static_cast<double>(height), w = static_cast<double>(width);
  const double widest = (1 + fabs(k)) * (w + fabs(mx)) / l1, highest = (h + fabs(my)) * per_y;
  g.extreme = !(reach < most && margin < most && widest < most && highest < most);
  const double rise = cut.radius * l3 * sqrt(stretch) + 1 + 8 * eps * fabs(my);
  if (mx + side + margin < 0 || mx - side - margin > w - 1) return g;
  g.top = clamped_row(my - rise + 1, h);
  g.bottom = clamped_row(my + rise + 1, h);
  return g;
}

}  // namespace sapwood::splat2d
