// The device kernels that pack and transpose, where a structure has more than 2^31 entries. Memory is
// reserved, not filled, and the last blocks alone run. Torch-free.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "masked_matmul/cuda_pack.cuh"
#include "reserved.h"

namespace {

using namespace sapwood::masked_matmul::device;

constexpr int64_t kFar = int64_t{1} << 31;
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// The values and columns of a few rows go to the end of a structure.
void check_pack() {
  constexpr int64_t n = 3, k = 70;
  std::vector<uint16_t> weight(n * k);
  std::vector<uint8_t> mask(n * k);
  std::vector<int64_t> row_ptr{kFar}, wanted;
  for (int64_t i = 0; i < n * k; ++i) {
    weight[static_cast<size_t>(i)] = static_cast<uint16_t>(i + 1);
    mask[static_cast<size_t>(i)] = i % 5 == 0 || i % 7 == 3;
    if (mask[static_cast<size_t>(i)]) wanted.push_back(i);
    if (i % k == k - 1) row_ptr.push_back(kFar + static_cast<int64_t>(wanted.size()));
  }
  const Reserved<uint16_t> values(kFar + n * k);
  const Reserved<int32_t> columns(kFar + n * k);
  launch_pack<uint16_t>({weight.data(), k, 1}, {mask.data(), k, 1}, row_ptr.data(), n, k,
                        values.get(), {{columns.get(), true}, nullptr, 0}, nullptr);
  for (size_t e = 0; e < wanted.size(); ++e) {
    const auto at = kFar + static_cast<int64_t>(e);
    expect(values.get()[at] == wanted[e] + 1, "value " + std::to_string(e));
    expect(columns.get()[at] == wanted[e] % k, "column " + std::to_string(e));
  }
}

void check_widen(bool wide) {
  constexpr int64_t count = kFar + 5;
  const Reserved<int32_t> from(count), keys(count);
  for (int64_t i = kFar; i < count; ++i) {
    const auto column = static_cast<int32_t>(7 * (i - kFar) + 1);
    if (wide) {
      from.get()[i] = column;
    } else {
      reinterpret_cast<uint16_t*>(from.get())[i] = static_cast<uint16_t>(column);
    }
  }
  launch_widen({from.get(), wide}, count, keys.get(), nullptr);
  for (int64_t i = kFar; i < count; ++i) {
    expect(keys.get()[i] == 7 * (i - kFar) + 1, "key " + std::to_string(i));
  }
}

// Five entries of three rows at the end of a structure whose other entries lie in row and column 0.
void check_transpose() {
  constexpr int64_t count = kFar + 5, n = 3, k = 4;
  const Reserved<int32_t> sorted(count);
  const Reserved<int64_t> perm(count);
  const Reserved<uint16_t> columns(count);
  const std::vector<int64_t> row_ptr{0, kFar + 1, kFar + 3, count};
  const std::vector<int64_t> places{kFar + 2, kFar, kFar + 4, kFar + 1, kFar + 3};
  const std::vector<int32_t> ascending{1, 1, 2, 2, 3};
  for (int64_t i = kFar; i < count; ++i) {
    sorted.get()[i] = ascending[static_cast<size_t>(i - kFar)];
    perm.get()[i] = places[static_cast<size_t>(i - kFar)];
  }
  std::vector<int64_t> row_ptr_t(k + 1);
  launch_transpose(sorted.get(), perm.get(), count, row_ptr.data(), n, k, {columns.get(), false},
                   row_ptr_t.data(), nullptr);
  const std::vector<uint16_t> rows{1, 0, 2, 1, 2};
  for (int64_t i = kFar; i < count; ++i) {
    expect(columns.get()[i] == rows[static_cast<size_t>(i - kFar)], "row " + std::to_string(i));
  }
  // The starts of the rows are left to the first block: what it calls.
  const std::vector<int64_t> starts{0, kFar, kFar + 2, kFar + 4, count};
  for (int32_t c = 0; c <= k; ++c) {
    expect(lower_bound(sorted.get(), count, c) == starts[static_cast<size_t>(c)],
           "start " + std::to_string(c));
  }
}

}  // namespace

int main() {
  setenv("SAPWOOD_EMU_LAST_BLOCKS", "1", 1);
  check_pack();
  check_widen(false);
  check_widen(true);
  check_transpose();
  if (failures == 0) std::printf("all offsets are right\n");
  return failures == 0 ? 0 : 1;
}
