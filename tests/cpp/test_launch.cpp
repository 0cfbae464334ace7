// The emulation header itself: indices, shared memory, barriers, warp operations, atomics, errors.
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "common/launch.h"
#include "expect.h"

namespace {

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

__global__ void write_indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

void indices_cover_the_grid() {
  std::vector<unsigned> out(3 * 2 * 2 * 64, ~0u);
  SAPWOOD_LAUNCH(write_indices, dim3(3, 2, 2), dim3(16, 2, 2), 0, nullptr, out.data());
  SAPWOOD_CUDA_CHECK(cudaGetLastError());
  bool right = true;
  for (unsigned i = 0; i < out.size(); ++i) right &= out[i] == i / 64 * 1000 + i % 64;
  expect(right, "every thread of every block runs once with its own indices");
}

template <bool Synchronise>
__global__ void reverse(const float* in, float* out) {
  SAPWOOD_SHARED(float, tile, 64);
  const unsigned t = threadIdx.x;
  tile[t] = in[blockIdx.x * 64 + t];
  if (Synchronise) __syncthreads();
  out[blockIdx.x * 64 + t] = tile[63 - t];
}

void barriers_order_shared_memory() {
  std::vector<float> in(64 * 100), right(in.size()), wrong(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  auto synchronised = reverse<true>;
  SAPWOOD_LAUNCH(synchronised, 100, 64, 0, nullptr, in.data(), right.data());
  bool equal = true;
  for (size_t i = 0; i < in.size(); ++i) equal &= right[i] == in[i / 64 * 64 + 63 - i % 64];
  expect(equal, "a synchronised exchange through shared memory is exact");
#if !defined(__SANITIZE_THREAD__)
  auto racing = reverse<false>;
  SAPWOOD_LAUNCH(racing, 100, 64, 0, nullptr, in.data(), wrong.data());
  int undefined = 0;
  for (const float v : wrong) undefined += std::isnan(v);
  expect(undefined > 0, "without the barrier some reads see memory that was never written");
#endif
}

__global__ void read_unwritten(float* out, int* out_int) {
  SAPWOOD_SHARED(float, floats, 32);
  SAPWOOD_DYN_SHARED(int, ints);
  out[blockIdx.x * 32 + threadIdx.x] = floats[threadIdx.x];
  out_int[blockIdx.x * 32 + threadIdx.x] = ints[threadIdx.x];
  floats[threadIdx.x] = 1.0f;
  ints[threadIdx.x] = 1;
}

void shared_memory_starts_undefined() {
  std::vector<float> out(96);
  std::vector<int> out_int(96);
  SAPWOOD_LAUNCH(read_unwritten, 3, 32, 32 * sizeof(int), nullptr, out.data(), out_int.data());
  bool undefined = true;
  for (size_t i = 0; i < out.size(); ++i) undefined &= std::isnan(out[i]) && out_int[i] == -1;
  expect(undefined, "shared memory is NaN or -1 at the start of each block");
}

__global__ void early_return(int* out) {
  SAPWOOD_SHARED(int, tile, 96);
  if (threadIdx.x >= 48) return;
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[47 - threadIdx.x];
  if (threadIdx.x < 32) {
    __syncwarp();
    out[threadIdx.x] += __shfl_sync(sapwood::kFullMask, 100, 5);
  }
}

void returned_threads_leave_the_barriers() {
  std::vector<int> out(48);
  SAPWOOD_LAUNCH(early_return, 1, 96, 0, nullptr, out.data());
  bool right = true;
  for (int i = 0; i < 48; ++i) right &= out[i] == 47 - i + (i < 32 ? 100 : 0);
  expect(right, "threads that return early do not block the others");
}

__global__ void warp_operations(int* down, int* up, int* crossed, double* picked, unsigned* votes) {
  const int t = static_cast<int>(threadIdx.x);
  down[t] = __shfl_down_sync(sapwood::kFullMask, t, 3);
  up[t] = __shfl_up_sync(sapwood::kFullMask, t, 3);
  crossed[t] = __shfl_xor_sync(sapwood::kFullMask, t, 16);
  picked[t] = __shfl_sync(sapwood::kFullMask, t + 0.5, 7);
  votes[t] = __ballot_sync(sapwood::kFullMask, t % 3 == 0);
}

void warp_operations_stay_in_the_warp() {
  std::vector<int> down(64), up(64), crossed(64);
  std::vector<double> picked(64);
  std::vector<unsigned> votes(64);
  SAPWOOD_LAUNCH(warp_operations, 1, 64, 0, nullptr, down.data(), up.data(), crossed.data(),
                 picked.data(), votes.data());
  bool right = true;
  for (int t = 0; t < 64; ++t) {
    const int first = t / 32 * 32;
    unsigned vote = 0;
    for (int lane = 0; lane < 32; ++lane) vote |= ((first + lane) % 3 == 0 ? 1u : 0u) << lane;
    right &= down[t] == (t % 32 + 3 < 32 ? t + 3 : t) && up[t] == (t % 32 >= 3 ? t - 3 : t);
    right &= crossed[t] == (t ^ 16) && picked[t] == first + 7.5 && votes[t] == vote;
  }
  expect(right, "shuffles and ballots see the lanes of their own warp");
}

__global__ void ballot_of_the_remaining(unsigned* votes) {
  if (threadIdx.x >= 8) return;
  votes[threadIdx.x] = __ballot_sync(sapwood::kFullMask, 1);
}

void returned_lanes_do_not_vote() {
  std::vector<unsigned> votes(8);
  SAPWOOD_LAUNCH(ballot_of_the_remaining, 4, 32, 0, nullptr, votes.data());
  bool right = true;
  for (const unsigned v : votes) right &= v == 0xffu;
  expect(right, "a lane that has returned does not vote");
}

__global__ void count_atomically(int* sum, int* most, int* least, float* total, int* owner) {
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(sum, 1);
  atomicMax(most, id);
  atomicMin(least, -id);
  atomicAdd(total, 0.5f);
  atomicCAS(owner, -1, id);
}

void atomics_lose_nothing() {
  int sum = 0, most = 0, least = 0, owner = -1;
  float total = 0;
  SAPWOOD_LAUNCH(count_atomically, 8, 64, 0, nullptr, &sum, &most, &least, &total, &owner);
  expect(sum == 512 && most == 511 && least == -511 && total == 256.0f, "atomics lose no update");
  expect(owner >= 0 && owner < 512, "compare-and-swap takes one winner");
}

__global__ void throw_in_block(int* ran) {
  if (blockIdx.x == 1 && threadIdx.x == 5) throw std::runtime_error("from a kernel");
  __syncthreads();
  atomicAdd(ran, 1);
}

__global__ void partial_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0);
}

__global__ void too_much_shared(float* out) {
  SAPWOOD_SHARED(float, tile, 13 * 1024);
  tile[threadIdx.x] = 0;
  out[threadIdx.x] = tile[threadIdx.x];
}

void errors_reach_the_caller() {
  int ran = 0;
  std::vector<float> out(64);
  expect(
      error_of([&] { SAPWOOD_LAUNCH(throw_in_block, 3, 64, 0, nullptr, &ran); }) == "from a kernel",
      "an exception in a thread reaches the caller");
#if defined(SAPWOOD_EMU_SHUFFLE)
  expect(ran % 64 == 63, "the other threads of that block finish");
#else
  expect(ran == 64 + 63, "the other threads of that block finish, later blocks do not start");
#endif
  expect(error_of([&] {
           SAPWOOD_LAUNCH(partial_mask, 1, 32, 0, nullptr, out.data());
         }).find("full mask") != std::string::npos,
         "a partial mask is refused");
  expect(error_of([&] {
           SAPWOOD_LAUNCH(too_much_shared, 1, 32, 0, nullptr, out.data());
         }).find("48 KiB") != std::string::npos,
         "too much static shared memory is refused");
  expect(error_of([&] {
           SAPWOOD_LAUNCH(partial_mask, 1, 33, 0, nullptr, out.data());
         }).find("got 33") != std::string::npos,
         "a block of 33 threads is refused");
  expect(error_of([&] {
           SAPWOOD_LAUNCH(partial_mask, 0, 32, 0, nullptr, out.data());
         }).find("invalid grid (0, 1, 1)") != std::string::npos,
         "an empty grid is refused");
  expect(error_of([&] {
           SAPWOOD_LAUNCH(partial_mask, 1, 32, 50000, nullptr, out.data());
         }).find("48 KiB") != std::string::npos,
         "too much dynamic shared memory is refused");
}

void launches_from_several_threads_are_separate() {
  std::vector<std::vector<unsigned>> out(4, std::vector<unsigned>(128, ~0u));
  {
    std::vector<std::jthread> callers;
    for (auto& mine : out) {
      callers.emplace_back(
          [&mine] { SAPWOOD_LAUNCH(write_indices, 2, 64, 0, nullptr, mine.data()); });
    }
  }
  bool right = true;
  for (const auto& mine : out) {
    for (unsigned i = 0; i < 128; ++i) right &= mine[i] == i / 64 * 1000 + i % 64;
  }
  expect(right, "launches from several host threads do not disturb each other");
}

__global__ void record_order(int* counter, int* order) {
  if (threadIdx.x == 0) order[blockIdx.x] = atomicAdd(counter, 1);
}

void block_order_is_a_permutation() {
  int counter = 0;
  std::vector<int> order(64, -1);
  SAPWOOD_LAUNCH(record_order, 64, 32, 0, nullptr, &counter, order.data());
  std::vector<int> seen(64);
  bool sorted = true;
  for (int i = 0; i < 64; ++i) {
    ++seen[static_cast<size_t>(order[i])];
    sorted &= order[i] == i;
  }
  bool permutation = true;
  for (const int times : seen) permutation &= times == 1;
  expect(permutation, "every block runs exactly once");
#if defined(SAPWOOD_EMU_SHUFFLE)
  expect(!sorted, "with SAPWOOD_EMU_SHUFFLE the blocks run in another order");
#else
  expect(sorted, "blocks run in the order of their indices");
#endif
}

}  // namespace

int main() {
  indices_cover_the_grid();
  barriers_order_shared_memory();
  shared_memory_starts_undefined();
  returned_threads_leave_the_barriers();
  warp_operations_stay_in_the_warp();
  returned_lanes_do_not_vote();
  atomics_lose_nothing();
  errors_reach_the_caller();
  launches_from_several_threads_are_separate();
  block_order_is_a_permutation();
  std::printf("%s\n", failures ? "failed" : "ok");
  return failures != 0;
}
