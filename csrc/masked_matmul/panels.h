// A batch split into panels, transposed to (K, width) each: where they lie and how they are filled.
// No torch header here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "masked_matmul/kernel.h"

namespace sapwood::masked_matmul {

// Rows [b0, b0 + batch) of x; data (K, width), zero beyond the batch.
template <class T>
struct Panel {
  int64_t b0, batch, width;
  T* data;
};

constexpr int64_t kFillColumns = 64;  // of a panel, filled by one task

// What the panels of x (rows, columns) take; the last one may be wider than the rows that are left.
inline int64_t panel_elements(int64_t rows, int64_t columns) {
  return (rows + kMaxPanel) * columns;
}

// The panels of x (rows, columns), one behind the other in `buffer`.
template <class T>
std::vector<Panel<T>> split_into_panels(int64_t rows, int64_t columns, T* buffer) {
  std::vector<Panel<T>> panels;
  for (int64_t b = 0; b < rows;) {
    const int64_t width = panel_width(rows - b);
    panels.push_back({b, std::min(width, rows - b), width, buffer});
    buffer += width * columns;
    b += width;
  }
  return panels;
}

// kFillColumns columns of a panel from `first` on, as far as there are any; x (B, columns).
template <class T>
void fill_columns(const Panel<T>& panel, const T* x, int64_t columns, int64_t first) {
  const int64_t last = std::min(columns, first + kFillColumns);
  SAPWOOD_ISA_CALL(fill_panel(x + panel.b0 * columns, columns, panel.batch, first, last, panel.data,
                              panel.width));
}

}  // namespace sapwood::masked_matmul
