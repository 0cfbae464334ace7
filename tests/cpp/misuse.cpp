// Two kernels with a defect each, for the tests that the sanitizers see through the emulation.
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

__global__ void overrun(float* out) {
  SAPWOOD_SHARED(float, tile, 64);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<float> out(64);
  auto kernel = argc > 1 && std::strcmp(argv[1], "overrun") == 0 ? overrun : missing_barrier;
  SAPWOOD_LAUNCH(kernel, 1, 64, 0, nullptr, out.data());
  std::printf("%g\n", out[0]);
  return 0;
}
