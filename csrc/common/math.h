// exp, log and the activations as branch-free scalar code that gcc turns into vector code, because
// glibc's vector versions are only reached with -ffast-math. The float polynomials are minimax fits
// (relative error exp 3e-9, log 8e-10, erfcx 4e-8); double overloads are the standard library's.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace sapwood::math {

SAPWOOD_INLINE float scale_by_power_of_two(float x, int32_t n) {
  return x * std::bit_cast<float>((n + 127) << 23);  // n in [-126, 127]
}

// e^x within 2 ulp; exp(-inf) = 0, exp(inf) = inf, subnormal results are rounded once, NaN is kept.
SAPWOOD_INLINE float exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;  // the magic number rounds to an integer
  const float n = shifted - 0x1.8p+23f;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6db41p-10f;
  p = p * r + 0x1.123b46p-7f;
  p = p * r + 0x1.55545ep-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0.5f;
  const float y = (p * r) * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - 0x4b400000;
  const int32_t half = exponent >> 1;  // two factors: the result may be subnormal
  return scale_by_power_of_two(scale_by_power_of_two(y, half), exponent - half);
}
SAPWOOD_INLINE double exp(double x) {
  return std::exp(x);
}

// ln x within 2 ulp; log(0) = -inf, log(inf) = inf, NaN below 0; subnormal arguments are exact.
SAPWOOD_INLINE float log(float x) {
  const bool tiny = x < 0x1p-126f;
  const float scaled = tiny ? x * 0x1p+23f : x;
  const int32_t bits = std::bit_cast<int32_t>(scaled);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1.0f;
  const float n = static_cast<float>(exponent - (tiny ? 23 : 0));
  float p = 0x1.14573ep-4f;
  p = p * f - 0x1.de3bf8p-4f;
  p = p * f + 0x1.e6f08cp-4f;
  p = p * f - 0x1.fc220ep-4f;
  p = p * f + 0x1.233766p-3f;
  p = p * f - 0x1.555c4ep-3f;
  p = p * f + 0x1.99a4b6p-3f;
  p = p * f - 0x1.000006p-2f;
  p = p * f + 0x1.555548p-2f;
  float y = (p * f) * (f * f) + n * 0x1.7f7d1cp-20f;
  y = (y - 0.5f * f * f) + f + n * 0x1.62e4p-1f;
  y = x == 0.0f ? -INFINITY : y;
  y = x < 0.0f ? NAN : y;
  y = x == INFINITY ? x : y;
  return x != x ? x : y;
}
SAPWOOD_INLINE double log(double x) {
  return std::log(x);
}

// 1 - erf(z) for z >= 0, relative error below 1e-6 (the exponent z^2 is rounded once).
SAPWOOD_INLINE float erfc_of_nonnegative(float z) {
  z = z > 13.0f ? 13.0f : z;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = -0x1.e1dbc8p-5f;
  p = p * t + 0x1.22135ap-2f;
  p = p * t - 0x1.efe562p-2f;
  p = p * t + 0x1.18ecb8p-2f;
  p = p * t - 0x1.83f2f8p-6f;
  p = p * t + 0x1.9c0912p-3f;
  p = p * t + 0x1.f2e04ep-3f;
  p = p * t + 0x1.210d3ep-2f;
  p = p * t + 0x1.20de2ap-2f;
  p = p * t - 0x1.1ce2a8p-21f;
  return p * exp(-z * z);
}

template <class T>
SAPWOOD_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// x sigmoid(x); at -inf the limit 0 would be NaN in torch too, which is kept.
template <class T>
SAPWOOD_INLINE T silu(T x) {
  return x * sigmoid(x);
}

SAPWOOD_INLINE float gelu(float x) {
  const float z = x * 0x1.6a09e6p-1f;
  const float tail = 0.5f * erfc_of_nonnegative(z < 0.0f ? -z : z);
  return x * (z < 0.0f ? tail : 1.0f - tail);
}
SAPWOOD_INLINE double gelu(double x) {
  return 0.5 * x * std::erfc(-x * 0.70710678118654752440);
}

// The tanh form of gelu: 1 + tanh(u) = 2 sigmoid(2 u).
template <class T>
SAPWOOD_INLINE T gelu_tanh(T x) {
  const T u = T(1.5957691216057308) * x * (T(1) + T(0.044715) * x * x);
  return x * sigmoid(u);
}

template <class T>
SAPWOOD_INLINE T relu(T x) {
  return x < T(0) ? T(0) : x;  // keeps NaN
}

}  // namespace sapwood::math
