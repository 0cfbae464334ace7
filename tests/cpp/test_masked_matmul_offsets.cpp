// The device kernels that pack and transpose, where a structure has more than 2^31 entries, and the
// CPU's panels of more than 2^31 inputs. Memory is reserved, not filled: the last blocks and the ends
// of the panels alone run. Torch-free.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "expect.h"
#include "masked_matmul/cuda_pack.cuh"
#include "masked_matmul/panels.h"
#include "reserved.h"

namespace {

using namespace sapwood::masked_matmul;
using namespace sapwood::masked_matmul::device;

constexpr int64_t kFar = int64_t{1} << 31;
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

// Whole numbers, whose sums are exact in any order.
float input(int64_t b, int64_t c) {
  return static_cast<float>((7 * b + 3 * c) % 9 - 4);
}
float weight(int64_t row, int64_t c) {
  return static_cast<float>((5 * row + c) % 7 - 3);
}

// After column c, of the first and the last ones.
constexpr int64_t kEnd = 9;
int64_t next_column(int64_t c, int64_t columns) {
  return c + 1 == kEnd ? columns - kEnd : c + 1;
}

// Weights of three rows that keep every other one of the first and of the last columns.
struct EndColumns {
  static constexpr int64_t kRows = 3;

  explicit EndColumns(int64_t columns)
      : k(columns),
        words_per_row((k + kWordBits - 1) / kWordBits),
        words(static_cast<size_t>(kRows * words_per_row)) {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t c = 0; c < k; c = next_column(c, k)) {
        if ((row + c) % 2 != 0) continue;
        cols.push_back(static_cast<int32_t>(c));
        values.push_back(weight(row, c));
        words[static_cast<size_t>(row * words_per_row + c / kWordBits)] |=
            static_cast<uint16_t>(1u << c % kWordBits);
      }
      row_ptr.push_back(static_cast<int64_t>(cols.size()));
    }
  }

  float product(int64_t b, int64_t row) const {
    float sum = 0;
    for (int64_t e = row_ptr[static_cast<size_t>(row)]; e < row_ptr[static_cast<size_t>(row) + 1];
         ++e) {
      sum += values[static_cast<size_t>(e)] * input(b, cols[static_cast<size_t>(e)]);
    }
    return sum;
  }

  int64_t k, words_per_row;
  std::vector<uint16_t> words;
  std::vector<int32_t> cols;
  std::vector<float> values;
  std::vector<int64_t> row_ptr{0};
};

void check_sums(const float* sums, const Panel<float>& panel, const EndColumns& w,
                const std::string& what) {
  for (int64_t row = 0; row < EndColumns::kRows; ++row) {
    for (int64_t b = 0; b < panel.batch; ++b) {
      expect(sums[row * panel.width + b] == w.product(panel.b0 + b, row),
             what + " row " + std::to_string(row) + " of " + std::to_string(panel.b0 + b));
    }
  }
}

// The last panels of x (rows, columns), whose columns between the ends stay zero.
void check_panels(int64_t rows, int64_t columns) {
  const Reserved<float> x(rows * columns), buffer(panel_elements(rows, columns));
  const Reserved<int32_t> listed(columns + kWordBits);
  const EndColumns w(columns);
  const auto panels = split_into_panels(rows, columns, buffer.get());
  for (size_t p = panels.size() - 2; p < panels.size(); ++p) {
    const Panel<float>& panel = panels[p];
    for (int64_t b = panel.b0; b < panel.b0 + panel.batch; ++b) {
      for (int64_t c = 0; c < columns; c = next_column(c, columns)) {
        x.get()[b * columns + c] = input(b, c);
      }
    }
    fill_columns(panel, x.get(), columns, 0);
    fill_columns(panel, x.get(), columns, (columns - 1) / kFillColumns * kFillColumns);
    alignas(64) float sums[kChunkRows * kMaxPanel];
    const std::string what = std::to_string(rows) + " x " + std::to_string(columns);
    const Csr<float, int32_t> csr{w.values.data(), w.cols.data(), w.row_ptr.data(),
                                  EndColumns::kRows, columns};
    SAPWOOD_ISA_CALL(csr_chunk_of(csr, 0, EndColumns::kRows, panel.data, panel.width, sums,
                                  static_cast<float*>(nullptr)));
    check_sums(sums, panel, w, "csr " + what);
    const Bitmap<float> bitmap{w.values.data(), w.words.data(), w.row_ptr.data(), EndColumns::kRows,
                               columns};
    SAPWOOD_ISA_CALL(bitmap_chunk_of(bitmap, 0, EndColumns::kRows, panel.data, panel.width, sums,
                                     listed.get(), static_cast<float*>(nullptr)));
    check_sums(sums, panel, w, "bitmap " + what);
  }
}

}  // namespace

int main() {
  setenv("SAPWOOD_EMU_LAST_BLOCKS", "1", 1);
  check_pack();
  check_widen(false);
  check_widen(true);
  check_transpose();
  check_panels(kFar / 64 + 8, 64);   // many panels: the last ones begin beyond 2^31
  check_panels(65, kFar / 64 + 64);  // one that is longer than that, and one behind it
  if (failures == 0) std::printf("all offsets are right\n");
  return failures == 0 ? 0 : 1;
}
