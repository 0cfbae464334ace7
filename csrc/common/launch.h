// CUDA's vocabulary for kernels that nvcc compiles for the device and g++ compiles for the host.
//
// Under nvcc the macros are CUDA itself. Under g++ common/emulation.h runs every thread of a block
// as a real thread, so that the sanitizers and the debugger see a kernel as ordinary C++.
//
// Rules for a kernel that shall run in both: launch only by SAPWOOD_LAUNCH followed by
// SAPWOOD_CUDA_CHECK(cudaGetLastError()); declare shared memory only by SAPWOOD_SHARED and
// SAPWOOD_DYN_SHARED at the top of the kernel, before any branch, the dynamic one last; block sizes
// are multiples of 32; shuffles and ballots take the full mask; no kernel may depend on the order
// of its blocks. A kernel template is bound to a variable before the launch, because the
// preprocessor does not know template commas.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define SAPWOOD_HD __host__ __device__
#define SAPWOOD_UNROLL _Pragma("unroll")
#define SAPWOOD_NO_UNROLL _Pragma("unroll 1")
#define SAPWOOD_SHARED(T, name, count) __shared__ T name[count]
#define SAPWOOD_DYN_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char sapwood_dynamic_[]; \
  T* name = reinterpret_cast<T*>(sapwood_dynamic_)
#define SAPWOOD_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  kernel<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)

#else

#include "common/emulation.h"

#define SAPWOOD_HD
#define SAPWOOD_UNROLL
#define SAPWOOD_NO_UNROLL
#define SAPWOOD_SHARED(T, name, count) T* name = sapwood::emulation::shared<T>(count)
#define SAPWOOD_DYN_SHARED(T, name) T* name = sapwood::emulation::dynamic_shared<T>()
#define SAPWOOD_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), sapwood::emulation::launch((kernel), (grid), (block), (bytes), __VA_ARGS__))

#endif

namespace sapwood {

using Stream = cudaStream_t;

inline constexpr unsigned kFullMask = 0xffffffffu;

inline void cuda_check(cudaError_t status, const char* file, int line) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("sapwood: CUDA error: ") + cudaGetErrorString(status) +
                             " (" + file + ":" + std::to_string(line) + ")");
  }
}

}  // namespace sapwood

#define SAPWOOD_CUDA_CHECK(expression) ::sapwood::cuda_check((expression), __FILE__, __LINE__)
