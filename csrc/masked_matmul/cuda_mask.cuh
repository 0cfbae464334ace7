// where(mask, weight, 0) in one pass. Elements are copied as bit patterns, so that one kernel per
// element size serves every dtype and a NaN under the mask does not leak.
#pragma once

#include "masked_matmul/cuda_common.cuh"

namespace sapwood::masked_matmul::device {

inline constexpr int kMaskPack = 4;

// Contiguous weight and mask; `out` may be `weight`.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    mask_flat_kernel(const Bits* weight, const uint8_t* mask, Bits* out, int64_t count) {
  const int64_t packs = count / kMaskPack;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < packs; i += step) {
    auto w = reinterpret_cast<const Pack<Bits, kMaskPack>*>(weight)[i];
    const auto m = reinterpret_cast<const Pack<uint8_t, kMaskPack>*>(mask)[i];
    SAPWOOD_UNROLL
    for (int j = 0; j < kMaskPack; ++j) w.at[j] = m.at[j] ? w.at[j] : Bits(0);
    reinterpret_cast<Pack<Bits, kMaskPack>*>(out)[i] = w;
  }
  for (int64_t i = packs * kMaskPack + thread; i < count; i += step) {
    out[i] = mask[i] ? weight[i] : Bits(0);
  }
}

// Any strides; `out` is contiguous (N, K).
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    mask_strided_kernel(Strided<Bits> weight, Strided<uint8_t> mask, Bits* out, int64_t n,
                        int64_t k) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < k; c += step) {
      out[row * k + c] = mask(row, c) ? weight(row, c) : Bits(0);
    }
  }
}

inline bool aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <class Bits>
void launch_mask(Strided<Bits> weight, Strided<uint8_t> mask, Bits* out, int64_t n, int64_t k,
                 Stream stream) {
  if (n == 0 || k == 0) return;
  const bool flat = weight.row_stride == k && weight.column_stride == 1 && mask.row_stride == k &&
                    mask.column_stride == 1 && aligned(weight.data, sizeof(Bits) * kMaskPack) &&
                    aligned(mask.data, kMaskPack) && aligned(out, sizeof(Bits) * kMaskPack);
  if (flat) {
    auto kernel = mask_flat_kernel<Bits>;
    SAPWOOD_LAUNCH(kernel, grid_x(n * k, kThreads * kMaskPack), kThreads, 0, stream, weight.data,
                   mask.data, out, n * k);
  } else {
    auto kernel = mask_strided_kernel<Bits>;
    SAPWOOD_LAUNCH(kernel, dim3(grid_x(k, kThreads), grid_y(n, 1)), kThreads, 0, stream, weight,
                   mask, out, n, k);
  }
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sapwood::masked_matmul::device
