// Three kernels with a defect each, for the tests that the sanitizers see through the emulation.
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/launch.h"

namespace {

__global__ void missing_barrier(float* out) {
  SAPWOOD_SHARED(float, tile, 64);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

// A shuffle waits for the lanes of a warp but does not order their memory.
__global__ void shuffle_for_barrier(float* out) {
  SAPWOOD_SHARED(float, tile, 64);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  const float next = __shfl_xor_sync(sapwood::kFullMask, tile[threadIdx.x], 1);
  out[threadIdx.x] = next + tile[threadIdx.x ^ 1u];
}

__global__ void overrun(float* out) {
  SAPWOOD_SHARED(float, tile, 64);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<float> out(64);
  const char* defect = argc > 1 ? argv[1] : "missing_barrier";
  auto kernel = std::strcmp(defect, "overrun") == 0               ? overrun
                : std::strcmp(defect, "shuffle_for_barrier") == 0 ? shuffle_for_barrier
                                                                  : missing_barrier;
  SAPWOOD_LAUNCH(kernel, 1, 64, 0, nullptr, out.data());
  std::printf("%g\n", out[0]);
  return 0;
}
