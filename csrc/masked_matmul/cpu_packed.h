// packed_linear_* and sampled_matmul on CPU tensors: panels, tasks of equal work, kernels.
#pragma once

#include "masked_matmul/cpu_tensors.h"
#include "masked_matmul/panels.h"

namespace sapwood::masked_matmul {

constexpr double kTaskGrain = 1 << 17;  // multiply-adds that are worth a thread

// The panels of a batch x (B, K).
template <class T>
class Panels {
 public:
  explicit Panels(const Tensor& x)
      : buffer_(panel_elements(x.size(0), x.size(1))),
        panels_(split_into_panels(x.size(0), x.size(1), buffer_.get())) {
    fill(data<T>(x), x.size(1));
  }

  const std::vector<Panel<T>>& all() const { return panels_; }

 private:
  void fill(const T* x, int64_t columns) {
    const int64_t blocks = (columns + kFillColumns - 1) / kFillColumns;
    const int64_t tasks = blocks * static_cast<int64_t>(panels_.size());
    parallel_range(tasks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        fill_columns(panels_[t / blocks], x, columns, t % blocks * kFillColumns);
      }
    });
  }

  Scratch<T> buffer_;
  std::vector<Panel<T>> panels_;
};

// Multiply-adds of rows [0, row) of the structure plus a constant for every row.
inline double work_before(const int64_t* row_ptr, int64_t row) {
  return static_cast<double>(row_ptr[row] + 4 * row);
}

// chunk(first row, rows, panel, sums) fills sums (rows, width); stored to out for every chunk of
// every panel.
template <class T, class Chunk>
void for_each_chunk(const Panels<T>& panels, const int64_t* row_ptr, int64_t n,
                    const Output<T>& out, const Chunk& chunk) {
  const auto& all = panels.all();
  const int64_t chunks = (n + kChunkRows - 1) / kChunkRows;
  const auto before = [&](int64_t task) {
    const int64_t panel = task / chunks, row = std::min(n, task % chunks * kChunkRows);
    double work = 0;
    for (int64_t p = 0; p < panel; ++p) work += all[p].width * work_before(row_ptr, n);
    return row == 0 ? work : work + all[panel].width * work_before(row_ptr, row);
  };
  const int64_t tasks = chunks * static_cast<int64_t>(all.size());
  parallel_weighted(tasks, kTaskGrain, before, [&](int64_t task) {
    const auto& panel = all[task / chunks];
    const int64_t first = task % chunks * kChunkRows, rows = std::min(kChunkRows, n - first);
    alignas(64) T sums[kChunkRows * kMaxPanel];
    chunk(first, rows, panel, sums);
    SAPWOOD_ISA_CALL(store_sums(sums, panel.width, rows, first, panel.b0, panel.batch, out));
  });
}

// The tensors of one packed_linear call, made contiguous and of the type of the arithmetic.
struct LinearCall {
  Tensor x, y;
  std::optional<Tensor> bias;
  Activation activation;
  int64_t b, n, k;

  template <class T>
  Output<T> output() const {
    return {mutable_data<T>(y), n, bias.has_value() ? data<T>(*bias) : nullptr, activation};
  }
};

inline LinearCall linear_call(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                              int64_t n, int64_t k, const std::string& activation) {
  check_dim(op, "input", x, 2);
  check_shape(op, "input", x, {x.size(0), k});
  check_int32(op, "weight's rows", n);
  check_int32(op, "weight's columns", k);
  if (bias.has_value()) check_shape(op, "bias", *bias, {n});
  const ScalarType type = compute_type(x.scalar_type());
  LinearCall call{contiguous_as(x, type),
                  new_tensor(x, {x.size(0), n}, type),
                  std::nullopt,
                  parse_activation(op, activation),
                  x.size(0),
                  n,
                  k};
  if (bias.has_value()) call.bias = contiguous_as(*bias, type);
  return call;
}

inline Tensor result_as(const LinearCall& call, ScalarType type) {
  return call.y.scalar_type() == type ? call.y : torch::stable::to(call.y, type);
}

inline void check_rows(const char* op, const Tensor& values, const Tensor& row_ptr, int64_t n) {
  check_shape(op, "row_ptr", row_ptr, {n + 1});
  check_dtype(op, "row_ptr", row_ptr, row_ptr.scalar_type() == ScalarType::Long, "int64");
  const bool consistent =
      n >= 0 && row_ptr.is_contiguous() && data<int64_t>(row_ptr)[n] == values.numel();
  STD_TORCH_CHECK(consistent, "sapwood.", op, ": row_ptr must be contiguous and end at ",
                  values.numel(), ", the number of values");
}

// row_order is for devices: here rows run in storage order, which the hardware prefetches (10 to
// 30 % faster than by length). The tensors of the transposed structure are for the backward.
inline Tensor packed_linear_csr(const Tensor& x, const Tensor& values, const Tensor& cols,
                                const Tensor& row_ptr, const Tensor&,
                                const std::optional<Tensor>& bias, int64_t k,
                                const std::string& activation, const std::optional<Tensor>&,
                                const std::optional<Tensor>&, const std::optional<Tensor>&,
                                const std::optional<Tensor>&) {
  constexpr const char* op = "packed_linear_csr";
  const int64_t n = row_ptr.numel() - 1;
  check_rows(op, values, row_ptr, n);
  check_shape(op, "cols", cols, {values.numel()});
  const LinearCall call = linear_call(op, x, bias, n, k, activation);
  const Tensor v = contiguous_as(values, values.scalar_type());
  const Tensor c = contiguous_as(cols, cols.scalar_type());
  with_types(op, x.scalar_type(), values.scalar_type(), [&](auto t, auto value) {
    using T = decltype(t);
    using Value = decltype(value);
    with_index(op, cols.scalar_type(), [&](auto index) {
      using Index = decltype(index);
      const Csr<Value, Index> w{data<Value>(v), data<Index>(c), data<int64_t>(row_ptr), n, k};
      const Panels<T> panels(call.x);
      for_each_chunk(panels, w.row_ptr, n, call.output<T>(),
                     [&](int64_t first, int64_t rows, const auto& panel, T* sums) {
                       const Scratch<T> scratch(std::is_same_v<T, Value> ? 0 : k);
                       SAPWOOD_ISA_CALL(csr_chunk_of(w, first, rows, panel.data, panel.width, sums,
                                                     scratch.get()));
                     });
    });
  });
  return result_as(call, x.scalar_type());
}

// x (B, K) with rows `stride` apart and zeros behind them, for kernels that read past K.
template <class T>
Scratch<T> padded_rows(const Tensor& x, int64_t batch, int64_t stride) {
  Scratch<T> padded(batch * stride);
  const int64_t rows = x.size(0), k = x.size(1);
  for (int64_t b = 0; b < batch; ++b) {
    T* row = padded.get() + b * stride;
    if (b < rows) std::copy_n(data<T>(x) + b * k, k, row);
    std::fill(row + (b < rows ? k : 0), row + stride, T(0));
  }
  return padded;
}

#if defined(__x86_64__)
// At most 8 batch rows on AVX-512.
template <class Value>
void bitmap_small_batch(const Bitmap<Value>& w, const LinearCall& call) {
  const int64_t stride = w.words_per_row() * kWordBits;
  const int64_t padded = call.b <= 2 ? call.b : call.b <= 4 ? 4 : 8;
  const Scratch<float> x = padded_rows<float>(call.x, padded, stride);
  const Output<float> out = call.output<float>();
  constexpr int64_t rows_per_task = 16;
  const int64_t tasks = (w.n + rows_per_task - 1) / rows_per_task;
  const auto before = [&](int64_t task) {
    const int64_t row = std::min(w.n, task * rows_per_task);
    return static_cast<double>(padded) *
           (work_before(w.row_ptr, row) + 4.0 * row * w.words_per_row());
  };
  parallel_weighted(tasks, kTaskGrain, before, [&](int64_t task) {
    const int64_t first = task * rows_per_task, rows = std::min(rows_per_task, w.n - first);
    const Scratch<float> scratch(std::is_same_v<float, Value> ? 0 : 4 * w.k);
    const auto run = [&](auto kernel) {
      kernel(w, first, rows, x.get(), stride, 0, call.b, scratch.get(), out);
    };
    switch (padded) {
      case 1:
        return run(isa_avx512::bitmap_rows<1, Value>);
      case 2:
        return run(isa_avx512::bitmap_rows<2, Value>);
      case 4:
        return run(isa_avx512::bitmap_rows<4, Value>);
      default:
        return run(isa_avx512::bitmap_rows<8, Value>);
    }
  });
}
#endif

inline Tensor packed_linear_bitmap(const Tensor& x, const Tensor& values, const Tensor& words,
                                   const Tensor& row_ptr, const std::optional<Tensor>& bias,
                                   int64_t k, const std::string& activation) {
  constexpr const char* op = "packed_linear_bitmap";
  const int64_t n = row_ptr.numel() - 1;
  check_rows(op, values, row_ptr, n);
  check_shape(op, "words", words, {n, (k + kWordBits - 1) / kWordBits});
  check_dtype(op, "words", words, words.scalar_type() == ScalarType::Short, "int16 bit patterns");
  const LinearCall call = linear_call(op, x, bias, n, k, activation);
  const Tensor v = contiguous_as(values, values.scalar_type());
  const Tensor bits = contiguous_as(words, ScalarType::Short);
  with_types(op, x.scalar_type(), values.scalar_type(), [&](auto t, auto value) {
    using T = decltype(t);
    using Value = decltype(value);
    const Bitmap<Value> w{data<Value>(v), data<uint16_t>(bits), data<int64_t>(row_ptr), n, k};
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, float>) {
      if (isa() == Isa::avx512 && call.b > 0 && call.b <= 8) return bitmap_small_batch(w, call);
    }
#endif
    const Panels<T> panels(call.x);
    for_each_chunk(panels, w.row_ptr, n, call.output<T>(),
                   [&](int64_t first, int64_t rows, const auto& panel, T* sums) {
                     const Scratch<int32_t> cols(k + kWordBits);
                     const Scratch<T> scratch(std::is_same_v<T, Value> ? 0 : k);
                     SAPWOOD_ISA_CALL(bitmap_chunk_of(w, first, rows, panel.data, panel.width, sums,
                                                      cols.get(), scratch.get()));
                   });
  });
  return result_as(call, x.scalar_type());
}

inline Tensor packed_linear_sell(const Tensor& x, const Tensor& values, const Tensor& index,
                                 const Tensor& window, const Tensor& slice_ptr,
                                 const std::optional<Tensor>& bias, int64_t n, int64_t k,
                                 const std::string& activation) {
  constexpr const char* op = "packed_linear_sell";
  const int64_t slices = (n + kSliceRows - 1) / kSliceRows, steps = window.numel();
  check_shape(op, "values", values, {steps, kSliceRows});
  check_shape(op, "index", index, {steps, kSliceRows});
  check_dtype(op, "index", index, index.scalar_type() == ScalarType::Byte, "uint8");
  check_dtype(op, "window", window, window.scalar_type() == ScalarType::Int, "int32");
  check_rows(op, window, slice_ptr, slices);
  const LinearCall call = linear_call(op, x, bias, n, k, activation);
  const Tensor v = contiguous_as(values, values.scalar_type());
  const Tensor i = contiguous_as(index, ScalarType::Byte),
               win = contiguous_as(window, ScalarType::Int);
  with_types(op, x.scalar_type(), values.scalar_type(), [&](auto t, auto value) {
    using T = decltype(t);
    using Value = decltype(value);
    const Sell<Value> w{
        data<Value>(v), data<uint8_t>(i), data<int32_t>(win), data<int64_t>(slice_ptr), n, k};
    const int64_t stride = k + kWindow + 1;
    const Scratch<T> padded = padded_rows<T>(call.x, call.b, stride);
    const Output<T> out = call.output<T>();
    constexpr int64_t group = isa_base::kSellBatch;
    const int64_t tasks = slices * ((call.b + group - 1) / group);
    const auto before = [&](int64_t task) {
      return static_cast<double>(group * kSliceRows) *
             static_cast<double>(task / slices * steps + w.slice_ptr[task % slices] + task);
    };
    parallel_weighted(tasks, kTaskGrain, before, [&](int64_t task) {
      const int64_t b0 = task / slices * group;
      SAPWOOD_ISA_CALL(sell_slice(w, task % slices, padded.get() + b0 * stride, stride, b0,
                                  std::min(group, call.b - b0), out));
    });
  });
  return result_as(call, x.scalar_type());
}

inline Tensor sampled_matmul(const Tensor& grad, const Tensor& x, const Tensor& cols,
                             const Tensor& row_ptr) {
  constexpr const char* op = "sampled_matmul";
  check_dim(op, "input", x, 2);
  const int64_t n = row_ptr.numel() - 1, nnz = cols.numel(), k = x.size(1);
  check_shape(op, "grad_output", grad, {x.size(0), n});
  check_rows(op, cols, row_ptr, n);
  const ScalarType type = compute_type(x.scalar_type());
  const Tensor c = contiguous_as(cols, cols.scalar_type());
  const Tensor out = new_tensor(x, {nnz}, type);
  with_types(op, type, type, [&](auto t, auto) {
    using T = decltype(t);
    if (x.size(0) == 0) return std::fill_n(mutable_data<T>(out), nnz, T(0)), void();
    const Panels<T> activations(contiguous_as(x, type));
    const Panels<T> gradients(contiguous_as(grad, type));
    const int64_t* ends = data<int64_t>(row_ptr);
    with_index(op, cols.scalar_type(), [&](auto index) {
      using Index = decltype(index);
      const int64_t chunks = (n + kChunkRows - 1) / kChunkRows;
      const auto before = [&](int64_t task) {
        return static_cast<double>(x.size(0)) * work_before(ends, std::min(n, task * kChunkRows));
      };
      parallel_weighted(chunks, kTaskGrain, before, [&](int64_t task) {
        const int64_t first = task * kChunkRows, rows = std::min(kChunkRows, n - first);
        for (size_t p = 0; p < activations.all().size(); ++p) {
          const auto& panel = activations.all()[p];
          SAPWOOD_ISA_CALL(sampled_rows_of(gradients.all()[p].data, panel.data, panel.width, k,
                                           data<Index>(c), ends, first, rows, nnz, p > 0,
                                           mutable_data<T>(out)));
        }
      });
    });
  });
  return out.scalar_type() == x.scalar_type() ? out : torch::stable::to(out, x.scalar_type());
}

}  // namespace sapwood::masked_matmul
