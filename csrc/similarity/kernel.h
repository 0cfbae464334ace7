// Similarities of rows without the N x N matrix. The ladder, each rung with what it gains over the
// one before (measured figures are in README.md):
//   1 naive            every pair in double, six lines: the oracle of the unit tests
//   2 packed panels    rows normalised once and laid side by side, so that a tile of products stays
//                      in registers over the whole depth and every load is a full line
//   3 fused test       the tile is compared with its thresholds in registers; a tile without a hit is
//                      never written, so neither memory nor page faults grow with N x N
//   4 upper triangle   x with itself needs half of the tiles
//   5 exact decisions  what lies within the rounding error of a threshold is decided in double, from
//                      the original rows: the fast product only proposes
// No torch header here; nothing allocates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "similarity/problem.h"

namespace sapwood::similarity {

// How a row enters a product: (x * scale - mean) * inverse. A row without direction (zero, constant
// under correlation, or not finite) has inverse 0.
struct Row {
  double scale = 1;    // a power of two, so that squares neither overflow nor vanish
  double mean = 0;     // of the scaled row
  double inverse = 0;  // 1 / norm of the scaled and centred row
  bool finite = true;
};

// 2^-e for a largest magnitude in [2^e, 2^(e+1)); the clamp keeps the factor finite.
inline double scale_for(double peak) {
  if (!(peak > 0) || !(peak <= std::numeric_limits<double>::max())) return 1.0;
  return std::ldexp(1.0, -std::clamp(std::ilogb(peak), -1022, 1022));
}

// Rung 1: the similarity of two rows from their definition; rows that are not finite are the
// caller's business.
template <class T>
double similarity_naive(const T* x, const T* y, int64_t d, Kind kind) {
  double mean_x = 0, mean_y = 0;
  for (int64_t c = 0; kind == Kind::correlation && c < d; ++c) {
    mean_x += static_cast<double>(x[c]) / static_cast<double>(d);
    mean_y += static_cast<double>(y[c]) / static_cast<double>(d);
  }
  double xy = 0, xx = 0, yy = 0, distance = 0;
  for (int64_t c = 0; c < d; ++c) {
    const double a = static_cast<double>(x[c]) - mean_x, b = static_cast<double>(y[c]) - mean_y;
    xy += a * b;
    xx += a * a;
    yy += b * b;
    distance += (a - b) * (a - b);
  }
  if (kind == Kind::dot) return xy;
  if (kind == Kind::euclidean) return -distance;
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx) / std::sqrt(yy) : 0.0;
}

// A block of query rows against one panel of candidates, everything the tile loop needs. A value is
//   product                                    for dot, cosine and correlation
//   2 product - row_offset - column_offset     for euclidean (offsets: squared norms)
// and a candidate is proposed when it reaches its row's or its column's limit.
template <class T>
struct Strip {
  const T* rows;        // packed (micro tiles, K, tile rows)
  int64_t micro_tiles;  // how many
  const T* panel;       // packed (K, panel columns)
  int64_t k;
  const T* row_limit;      // (micro_tiles * tile rows,), +inf for padding
  const T* column_limit;   // (panel columns,), +inf for padding or where columns do not ask
  const T* row_offset;     // euclidean only
  const T* column_offset;  // euclidean only
  bool euclidean;
  bool absolute;
};

// Where the CPU multiplies pairs of bfloat16, a strip of floats may hold such pairs instead: k then
// counts words of two entries, and candidates are proposed by isa_avx512_bf16::propose.
inline bool has_bf16_tiles() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <class T>
struct Candidate {
  uint16_t row;     // inside the strip
  uint16_t column;  // inside the panel
  T value;
};

// Query rows of a strip: 256 candidates of a panel column never overflow a byte, and the packed rows
// shall fit half of a 1 MiB L2.
inline constexpr int64_t kStripRows = 252;  // a multiple of every tile height
inline constexpr int64_t kStripBytes = 512 * 1024;
inline constexpr int64_t kMaxPanel = 32;  // columns
inline constexpr int64_t kMaxCandidates = kStripRows * kMaxPanel;

struct Tile {
  int64_t rows, columns;  // of the register tile
};

}  // namespace sapwood::similarity

#define SAPWOOD_KERNEL_FILE "similarity/kernel_rows.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "similarity/kernel_tile.inl"
#include "common/foreach_isa.h"
#if defined(__x86_64__)
#define SAPWOOD_ISA isa_avx512_bf16
#define SAPWOOD_TARGET SAPWOOD_TARGET_AVX512 __attribute__((target("avx512bf16")))
#define SAPWOOD_VECTOR_BYTES 64
#define SAPWOOD_IS_AVX512 1
#define SAPWOOD_BF16_PAIRS 1
#include "similarity/kernel_tile.inl"
#undef SAPWOOD_ISA
#undef SAPWOOD_TARGET
#undef SAPWOOD_VECTOR_BYTES
#undef SAPWOOD_IS_AVX512
#undef SAPWOOD_BF16_PAIRS
#endif

namespace sapwood::similarity {

// The register tile of the instruction set in use; packed operands depend on it.
template <class T>
Tile tile_of() {
  Tile tile{};
  SAPWOOD_ISA_CALL(tile_shape<T>(tile));
  return tile;
}

inline int64_t strip_rows(const Tile& tile, int64_t k, int64_t element_bytes) {
  const int64_t fitting = kStripBytes / std::max<int64_t>(1, k * element_bytes);
  return std::clamp(fitting / tile.rows * tile.rows, tile.rows, kStripRows);
}

}  // namespace sapwood::similarity
