// Products with a masked weight. The ladder, each rung with what it gains over the one before
// (2048 x 2048, 90 % zeros, fp32, one core; measured figures are in README.md):
//   1 naive            six lines, obviously right: the oracle of the unit tests
//   2 csr on panels    skips the zeros; x transposed to (K, P), so that one weight meets P
//                      activations in registers and the matrix is read once per P batch rows
//   3 accumulator sets even and odd non-zeros in different registers hide the latency of the FMA
//   4 prefetch         the columns are known 16 non-zeros ahead; panel rows come from L2
//   5 column blocks    beyond K = 2048 the part of the panel in use stays in L2
//   6 bitmap, expand   batch 1..8, least memory: 16 weights of a row per instruction, no gather
//   7 sell, window     batch 1..8: x lies in registers and 64 rows share its loads; no gather, and
//                      no branch per row or segment
// Tried and left out: blocks of columns small enough for L1. At 90 % its row segments hold
// 13 non-zeros, and the mispredicted ends cost more than the L2 loads they save.
// No torch header here; nothing allocates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push  // gcc 12 warns of its own header's undefined values
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/math.h"
#include "common/simd.h"
#include "masked_matmul/formats.h"

namespace sapwood::masked_matmul {

// Rung 1: y = x where(mask, weight, 0)^T + bias in double. x (B, K), weight and mask (N, K).
template <class T>
void masked_matmul_naive(const T* x, const T* weight, const uint8_t* mask, const T* bias, double* y,
                         int64_t b, int64_t n, int64_t k) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias != nullptr ? static_cast<double>(bias[j]) : 0.0;
      for (int64_t c = 0; c < k; ++c) {
        if (mask[j * k + c] != 0) {
          sum += static_cast<double>(x[i * k + c]) * static_cast<double>(weight[j * k + c]);
        }
      }
      y[i * n + j] = sum;
    }
  }
}

// The width of the panel for `left` remaining batch rows: wide panels read the matrix less often.
inline int64_t panel_width(int64_t left) {
  return left > 32 ? 64 : left > 16 ? 32 : 16;
}

// Columns of a panel that fit half of a 1 MiB L2; a multiple of 16.
constexpr int64_t panel_block(int64_t width, int64_t element_bytes) {
  return 512 * 1024 / (width * element_bytes);
}

}  // namespace sapwood::masked_matmul

#define SAPWOOD_KERNEL_FILE "masked_matmul/kernel_panel.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "masked_matmul/kernel_bitmap.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "masked_matmul/kernel_sell.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "masked_matmul/kernel_sampled.inl"
#include "common/foreach_isa.h"
#define SAPWOOD_KERNEL_FILE "masked_matmul/kernel_pack.inl"
#include "common/foreach_isa.h"
