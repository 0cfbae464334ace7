// What CPU and GPU share: how far a fast product may be from the exact one, and names of kinds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sapwood::similarity {

// dot; rows scaled to norm 1; the same after centring each row; minus the squared distance.
enum class Kind { dot, cosine, correlation, euclidean };

inline bool is_unit(Kind kind) {
  return kind == Kind::cosine || kind == Kind::correlation;
}

// |fast - exact| <= relative * size + absolute, where the size of a pair is
//   1                    for rows of norm 1
//   |x_i| |x_j|          for dot
//   |x_i|^2 + |x_j|^2    for euclidean (weights are squared norms)
struct Tolerance {
  double relative = 0, absolute = 0;
  Kind kind = Kind::cosine;

  // 4 sqrt(d) eps is several times the largest error that sums of d rounded products show. The
  // absolute part covers products that vanish beside the largest row.
  template <class T>
  static Tolerance of(Kind kind, int64_t d, bool recheck, bool bf16 = false) {
    if (!recheck) return {0, 0, kind};
    const bool wide = sizeof(T) == 8;
    const double eps = std::numeric_limits<T>::epsilon();
    const double least = wide ? 1e-14 : 1e-6;
    // Rounded to bfloat16, each of two entries is off by up to 2^-8 of itself.
    const double rounding = bf16 ? 1.01 / 128 : 0.0;
    const double relative = rounding + std::max(least, 4 * std::sqrt(static_cast<double>(d)) * eps);
    return {relative, is_unit(kind) ? 0.0 : wide ? 1e-290 : 1e-36, kind};
  }

  double size(double a, double b) const {
    return kind == Kind::euclidean ? a + b : kind == Kind::dot ? a * b : 1.0;
  }
  double operator()(double a, double b) const { return relative * size(a, b) + absolute; }
};

// The largest T that is not above the limit.
template <class T>
T round_down(double limit) {
  const T rounded = static_cast<T>(limit);
  return static_cast<double>(rounded) <= limit
             ? rounded
             : std::nextafter(rounded, -std::numeric_limits<T>::infinity());
}

}  // namespace sapwood::similarity
