// pack_csr, pack_bitmap, pack_sell and transpose_csr on CPU tensors.
#pragma once

#include <tuple>

#include "masked_matmul/cpu_tensors.h"
#include "masked_matmul/pack.h"

namespace sapwood::masked_matmul {

constexpr int64_t kPackGrain = 1 << 15;  // weights per thread that are worth a task

struct DenseSource {
  Tensor weight, mask;
  int64_t n, k;
  int64_t row_grain() const { return kPackGrain / std::max<int64_t>(1, k) + 1; }
};

inline DenseSource dense_source(const char* op, const Tensor& weight, const Tensor& mask) {
  check_dim(op, "weight", weight, 2);
  check_shape(op, "mask", mask, weight.sizes());
  check_dtype(op, "mask", mask, mask.element_size() == 1, "bool or uint8");
  check_int32(op, "weight's rows", weight.size(0));
  check_int32(op, "weight's columns", weight.size(1));
  return {contiguous_as(weight, weight.scalar_type()), contiguous_as(mask, mask.scalar_type()),
          weight.size(0), weight.size(1)};
}

inline Tensor row_pointers(const DenseSource& source) {
  const Tensor row_ptr = new_tensor(source.mask, {source.n + 1}, ScalarType::Long);
  int64_t* ends = mutable_data<int64_t>(row_ptr);
  const uint8_t* mask = data<uint8_t>(source.mask);
  ends[0] = 0;
  parallel_range(source.n, source.row_grain(), [&](int64_t first, int64_t last) {
    count_rows(mask, source.k, first, last, ends + 1);
  });
  counts_to_ends(ends, source.n);
  return row_ptr;
}

struct Rows {
  Tensor values, cols, row_ptr;
};

inline Rows pack_rows(const char* op, const DenseSource& source, bool want_cols) {
  const Tensor row_ptr = row_pointers(source);
  const int64_t* ends = data<int64_t>(row_ptr);
  const int64_t nnz = ends[source.n], k = source.k;
  const Tensor values = new_tensor(source.weight, {nnz});
  const Tensor cols = new_tensor(source.weight, {want_cols ? nnz : 0}, index_type(k));
  const uint8_t* mask = data<uint8_t>(source.mask);
  with_bits(op, source.weight, [&](auto bits) {
    using Bits = decltype(bits);
    with_index(op, cols.scalar_type(), [&](auto index) {
      using Index = decltype(index);
      const Bits* weight = data<Bits>(source.weight);
      Bits* all_values = mutable_data<Bits>(values);
      Index* all_cols = mutable_data<Index>(cols);
      parallel_range(source.n, source.row_grain(), [&](int64_t first, int64_t last) {
        const Scratch<Bits> row_values(k + 1);
        const Scratch<Index> row_cols(k + 1);
        for (int64_t row = first; row < last; ++row) {
          const int64_t count =
              compact_row(weight + row * k, mask + row * k, k, row_values.get(), row_cols.get());
          std::copy_n(row_values.get(), count, all_values + ends[row]);
          if (want_cols) std::copy_n(row_cols.get(), count, all_cols + ends[row]);
        }
      });
    });
  });
  return {values, cols, row_ptr};
}

inline Tensor row_order_of(const Tensor& row_ptr) {
  const int64_t n = row_ptr.numel() - 1;
  const Tensor order = new_tensor(row_ptr, {n}, ScalarType::Int);
  order_rows(data<int64_t>(row_ptr), n, mutable_data<int32_t>(order));
  return order;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> pack_csr(const Tensor& weight,
                                                           const Tensor& mask) {
  const Rows rows = pack_rows("pack_csr", dense_source("pack_csr", weight, mask), true);
  return {rows.values, rows.cols, rows.row_ptr, row_order_of(rows.row_ptr)};
}

inline std::tuple<Tensor, Tensor, Tensor> pack_bitmap(const Tensor& weight, const Tensor& mask) {
  const DenseSource source = dense_source("pack_bitmap", weight, mask);
  const Rows rows = pack_rows("pack_bitmap", source, false);
  const int64_t per_row = (source.k + kWordBits - 1) / kWordBits;
  const Tensor words = new_tensor(source.weight, {source.n, per_row}, ScalarType::Short);
  uint16_t* all_words = mutable_data<uint16_t>(words);
  const uint8_t* bytes = data<uint8_t>(source.mask);
  parallel_range(source.n, source.row_grain(), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      pack_words(bytes + row * source.k, source.k, all_words + row * per_row);
    }
  });
  return {rows.values, words, rows.row_ptr};
}

// Schedules every slice. With null outputs counts[s] receives the steps of slice s; otherwise the
// steps are written from slice_ptr[s] on.
template <class Bits, class Index>
void schedule_slices(const Rows& rows, int64_t n, const int64_t* slice_ptr, Bits* values,
                     uint8_t* index, int32_t* window, int64_t* counts) {
  const int64_t* ends = data<int64_t>(rows.row_ptr);
  const Bits* row_values = data<Bits>(rows.values);
  const Index* cols = data<Index>(rows.cols);
  parallel_chunks(n, kSliceRows, [&](int64_t slice, int64_t row, int64_t last) {
    const int64_t at = window != nullptr ? slice_ptr[slice] : 0;
    int64_t steps = 0;
    SAPWOOD_ISA_CALL(schedule_slice(row_values, cols, ends + row, last - row,
                                    values + at * kSliceRows, index + at * kSliceRows,
                                    window == nullptr ? nullptr : window + at, &steps));
    if (counts != nullptr) counts[slice] = steps;
  });
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> pack_sell(const Tensor& weight,
                                                            const Tensor& mask) {
  const DenseSource source = dense_source("pack_sell", weight, mask);
  const Rows rows = pack_rows("pack_sell", source, true);
  const int64_t slices = (source.n + kSliceRows - 1) / kSliceRows;
  const Tensor slice_ptr = new_tensor(source.weight, {slices + 1}, ScalarType::Long);
  int64_t* ends = mutable_data<int64_t>(slice_ptr);
  ends[0] = 0;
  Tensor values = source.weight, index = source.mask, window = slice_ptr;
  with_bits("pack_sell", source.weight, [&](auto bits) {
    using Bits = decltype(bits);
    with_index("pack_sell", rows.cols.scalar_type(), [&](auto column) {
      using Index = decltype(column);
      schedule_slices<Bits, Index>(rows, source.n, nullptr, nullptr, nullptr, nullptr, ends + 1);
      counts_to_ends(ends, slices);
      const int64_t steps = ends[slices];
      values = new_tensor(source.weight, {steps, kSliceRows});
      index = new_tensor(source.weight, {steps, kSliceRows}, ScalarType::Byte);
      window = new_tensor(source.weight, {steps}, ScalarType::Int);
      schedule_slices<Bits, Index>(rows, source.n, ends, mutable_data<Bits>(values),
                                   mutable_data<uint8_t>(index), mutable_data<int32_t>(window),
                                   nullptr);
    });
  });
  return {values, index, window, slice_ptr};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> transpose_csr(const Tensor& cols,
                                                                const Tensor& row_ptr, int64_t k) {
  check_dim("transpose_csr", "cols", cols, 1);
  check_dim("transpose_csr", "row_ptr", row_ptr, 1);
  check_int32("transpose_csr", "columns", k);
  const Tensor from = contiguous_as(cols, cols.scalar_type());
  const Tensor from_ptr = contiguous_as(row_ptr, ScalarType::Long);
  const int64_t n = row_ptr.numel() - 1, nnz = cols.numel();
  STD_TORCH_CHECK(n >= 0 && data<int64_t>(from_ptr)[n] == nnz,
                  "sapwood.transpose_csr: row_ptr must end at the number of columns ", nnz);
  const Tensor rows_t = new_tensor(from, {nnz}, index_type(n));
  const Tensor column_ptr = new_tensor(from, {k + 1}, ScalarType::Long);
  const Tensor perm = new_tensor(from, {nnz}, ScalarType::Long);
  const Scratch<int64_t> cursor(k);
  with_index("transpose_csr", from.scalar_type(), [&](auto index) {
    with_index("transpose_csr", rows_t.scalar_type(), [&](auto index_t) {
      transpose_structure(data<decltype(index)>(from), data<int64_t>(from_ptr), n, k,
                          mutable_data<int64_t>(column_ptr),
                          mutable_data<decltype(index_t)>(rows_t), mutable_data<int64_t>(perm),
                          cursor.get());
    });
  });
  return {rows_t, column_ptr, row_order_of(column_ptr), perm};
}

}  // namespace sapwood::masked_matmul
