// masked_matmul on CUDA: tensors in, launches of the kernels in cuda_*.cuh, registration. The dense
// products, the sort and the prefix sums are torch's, reached through the dispatcher.
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/cuda.h"
#include "common/cuda_tensor.h"
#include "common/registry.h"
#include "masked_matmul/cuda_bitmap.cuh"
#include "masked_matmul/cuda_csr.cuh"
#include "masked_matmul/cuda_mask.cuh"
#include "masked_matmul/cuda_pack.cuh"
#include "masked_matmul/cuda_sampled.cuh"

namespace sapwood::masked_matmul::device {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kNarrowLimit = 65536;  // column indices below this are stored as uint16

template <class T>
Strided<T> strided(const Tensor& t) {
  return {input<T>(t), t.stride(0), t.stride(1)};
}

// Calls f(Type<X>, Type<V>): values of x's type, or half precision under a float32 x.
template <class F>
void dispatch_pair(const char* op, const Tensor& x, const Tensor& values, F&& f) {
  const ScalarType v = values.scalar_type();
  dispatch_float(op, "x", x, [&](auto type) {
    using X = typename decltype(type)::type;
    if (v == x.scalar_type()) return f(type, type);
    if constexpr (std::is_same_v<X, float>) {
      if (v == ScalarType::Half) return f(type, Type<c10::Half>{});
      if (v == ScalarType::BFloat16) return f(type, Type<c10::BFloat16>{});
    }
    check_dtype(op, "values", values, false, "of x's dtype, or float16 or bfloat16 under float32");
  });
}

// Calls f with an unsigned integer of the element size, for kernels that only move elements.
template <class F>
void dispatch_bits(const char* op, const Tensor& t, F&& f) {
  switch (t.element_size()) {
    case 2:
      return f(Type<uint16_t>{});
    case 4:
      return f(Type<uint32_t>{});
    case 8:
      return f(Type<uint64_t>{});
    default:
      check_dtype(op, "weight", t, false, "float32, float64, float16 or bfloat16");
  }
}

Activation activation_of(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "sapwood.", op,
                  ": activation must be one of none, relu, gelu, gelu_tanh, silu, got ", name);
  return Activation::silu;
}

void check_mask(const char* op, const Tensor& weight, const Tensor& mask) {
  check_dim(op, "weight", weight, 2);
  check_shape(op, "mask", mask, weight.sizes());
  check_device(op, "mask", mask, "weight", weight);
  const ScalarType type = mask.scalar_type();
  check_dtype(op, "mask", mask, type == ScalarType::Bool || type == ScalarType::Byte,
              "bool or uint8");
}

// where(mask, weight, 0), contiguous; in place if `out` is the weight.
void write_masked(const char* op, const Tensor& weight, const Tensor& mask, const Tensor& out) {
  const Stream stream = current_stream(weight);
  dispatch_bits(op, weight, [&](auto type) {
    using Bits = typename decltype(type)::type;
    launch_mask<Bits>(strided<Bits>(weight), strided<uint8_t>(mask), output<Bits>(out),
                      weight.size(0), weight.size(1), stream);
  });
}

Tensor masked(const char* op, const Tensor& weight, const Tensor& mask) {
  Tensor product = new_tensor(weight, weight.sizes());
  write_masked(op, weight, mask, product);
  return product;
}

Tensor masked_matmul(const Tensor& x, const Tensor& weight, const Tensor& mask,
                     const OptionalTensor& bias, bool /*dense_weight_grad*/) {
  const char* op = "masked_matmul";
  check_mask(op, weight, mask);
  check_device(op, "weight", weight, "x", x);
  const DeviceScope scope(x);
  return call("aten::linear", "", x, masked(op, weight, mask), bias);
}

std::tuple<Tensor, Tensor> masked_matmul_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& weight, const Tensor& mask,
                                                  bool need_x, bool need_weight,
                                                  bool dense_weight_grad) {
  const char* op = "masked_matmul_backward";
  check_mask(op, weight, mask);
  check_device(op, "weight", weight, "grad", grad);
  const DeviceScope scope(grad);
  Tensor grad_x =
      need_x ? call("aten::mm", "", grad, masked(op, weight, mask)) : new_tensor(x, {0});
  if (!need_weight) return {grad_x, new_tensor(weight, {0})};
  Tensor grad_weight = as_contiguous(call("aten::mm", "", torch::stable::transpose(grad, 0, 1), x));
  if (!dense_weight_grad) write_masked(op, grad_weight, mask, grad_weight);
  return {grad_x, grad_weight};
}

// row_ptr (N + 1,) of the kept entries and their number, which is read back from the device.
std::tuple<Tensor, int64_t> count_rows(const Tensor& weight, const Tensor& mask) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const Stream stream = current_stream(weight);
  const Tensor counts = new_tensor(weight, {n + 1}, ScalarType::Long);
  launch_count(strided<uint8_t>(mask), n, k, output<int64_t>(counts), stream);
  Tensor row_ptr = call("aten::cumsum", "", counts, int64_t{0}, std::optional<ScalarType>());
  return {row_ptr, read_back(input<int64_t>(row_ptr) + n, stream)};
}

void pack(const char* op, const Tensor& weight, const Tensor& mask, const Tensor& row_ptr,
          const Tensor& values, PackTarget target) {
  const Stream stream = current_stream(weight);
  dispatch_bits(op, weight, [&](auto type) {
    using Bits = typename decltype(type)::type;
    launch_pack<Bits>(strided<Bits>(weight), strided<uint8_t>(mask), input<int64_t>(row_ptr),
                      weight.size(0), weight.size(1), output<Bits>(values), target, stream);
  });
}

Tensor order_rows(const Tensor& row_ptr, int64_t n) {
  Tensor row_order = new_tensor(row_ptr, {n}, ScalarType::Int);
  launch_row_order(input<int64_t>(row_ptr), n, output<int32_t>(row_order), current_stream(row_ptr));
  return row_order;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_csr(const Tensor& weight, const Tensor& mask) {
  const char* op = "pack_csr";
  check_mask(op, weight, mask);
  check_int32(op, "weight's rows", weight.size(0));
  check_int32(op, "weight's columns", weight.size(1));
  const DeviceScope scope(weight);
  const auto [row_ptr, nnz] = count_rows(weight, mask);
  const bool wide = weight.size(1) > kNarrowLimit;
  Tensor values = new_tensor(weight, {nnz});
  Tensor cols = new_tensor(weight, {nnz}, wide ? ScalarType::Int : ScalarType::Short);
  pack(op, weight, mask, row_ptr, values, {{cols.mutable_data_ptr(), wide}, nullptr, 0});
  return {values, cols, row_ptr, order_rows(row_ptr, weight.size(0))};
}

std::tuple<Tensor, Tensor, Tensor> pack_bitmap(const Tensor& weight, const Tensor& mask) {
  const char* op = "pack_bitmap";
  check_mask(op, weight, mask);
  check_int32(op, "weight's rows", weight.size(0));
  check_int32(op, "weight's columns", weight.size(1));
  const DeviceScope scope(weight);
  const auto [row_ptr, nnz] = count_rows(weight, mask);
  const int64_t words_per_row = (weight.size(1) + 15) / 16;
  Tensor values = new_tensor(weight, {nnz});
  Tensor words = new_tensor(weight, {weight.size(0), words_per_row}, ScalarType::Short);
  pack(op, weight, mask, row_ptr, values,
       {{nullptr, false}, output<uint16_t>(words), words_per_row});
  return {values, words, row_ptr};
}

// Column tensor and row pointers of one structure agree in type and length.
Columns check_structure(const char* op, const Tensor& cols, const Tensor& row_ptr, int64_t k) {
  check_dim(op, "cols", cols, 1);
  check_dim(op, "row_ptr", row_ptr, 1);
  check_dtype(op, "row_ptr", row_ptr, row_ptr.scalar_type() == ScalarType::Long, "int64");
  STD_TORCH_CHECK(row_ptr.numel() > 0, "sapwood.", op, ": row_ptr must not be empty, got (0,)");
  check_device(op, "row_ptr", row_ptr, "cols", cols);
  const bool wide = k > kNarrowLimit;
  check_dtype(op, "cols", cols, cols.scalar_type() == (wide ? ScalarType::Int : ScalarType::Short),
              wide ? "int32 for more than 65536 columns" : "int16 for at most 65536 columns");
  return {cols.const_data_ptr(), wide};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> transpose_csr(const Tensor& cols_in,
                                                         const Tensor& row_ptr_in, int64_t k) {
  const char* op = "transpose_csr";
  STD_TORCH_CHECK(k >= 0, "sapwood.", op, ": k must be at least 0, got ", k);
  check_int32(op, "columns", k);
  const DeviceScope scope(cols_in);
  const Stream stream = current_stream(cols_in);
  const Tensor cols = as_contiguous(cols_in);
  const Tensor row_ptr = as_contiguous(row_ptr_in);
  const Columns columns = check_structure(op, cols, row_ptr, k);
  const int64_t n = row_ptr.numel() - 1, nnz = cols.numel();
  const Tensor keys = new_tensor(cols, {nnz}, ScalarType::Int);
  launch_widen(columns, nnz, output<int32_t>(keys), stream);
  StableIValue stack[] = {
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor perm = torch::stable::detail::to<Tensor>(stack[1]);
  const bool wide_t = n > kNarrowLimit;
  Tensor cols_t = new_tensor(cols, {nnz}, wide_t ? ScalarType::Int : ScalarType::Short);
  Tensor row_ptr_t = new_tensor(cols, {k + 1}, ScalarType::Long);
  launch_transpose(input<int32_t>(sorted), input<int64_t>(perm), nnz, input<int64_t>(row_ptr), n, k,
                   {cols_t.mutable_data_ptr(), wide_t}, output<int64_t>(row_ptr_t), stream);
  return {cols_t, row_ptr_t, order_rows(row_ptr_t, k), perm};
}

// What both packed products check of x, values and bias; returns the output (B, N).
Tensor packed_output(const char* op, const Tensor& x, const Tensor& values,
                     const OptionalTensor& bias, int64_t n, int64_t k) {
  check_dim(op, "x", x, 2);
  check_shape(op, "x", x, {x.size(0), k});
  check_dim(op, "values", values, 1);
  check_device(op, "values", values, "x", x);
  if (bias) {
    check_shape(op, "bias", *bias, {n});
    check_device(op, "bias", *bias, "x", x);
    check_dtype(op, "bias", *bias, bias->scalar_type() == x.scalar_type(), "of x's dtype");
  }
  return new_tensor(x, {x.size(0), n});
}

template <class X>
Epilogue<X> epilogue(const Tensor& out, const OptionalTensor& bias, Activation activation) {
  return {output<X>(out), bias ? input<X>(*bias) : nullptr, out.size(1), activation};
}

OptionalTensor contiguous_bias(const OptionalTensor& bias) {
  return bias ? OptionalTensor(as_contiguous(*bias)) : bias;
}

// The last four arguments carry the transposed structure to autograd.
Tensor packed_linear_csr(const Tensor& x, const Tensor& values_in, const Tensor& cols_in,
                         const Tensor& row_ptr_in, const Tensor& row_order_in,
                         const OptionalTensor& bias_in, int64_t k, const std::string& activation,
                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&) {
  const char* op = "packed_linear_csr";
  const DeviceScope scope(x);
  const Tensor values = as_contiguous(values_in);
  const Tensor cols = as_contiguous(cols_in);
  const Tensor row_ptr = as_contiguous(row_ptr_in);
  const Tensor row_order = as_contiguous(row_order_in);
  const OptionalTensor bias = contiguous_bias(bias_in);
  const Columns columns = check_structure(op, cols, row_ptr, k);
  const int64_t n = row_ptr.numel() - 1, batch = x.size(0);
  const Tensor out = packed_output(op, x, values, bias, n, k);
  check_shape(op, "values", values, cols.sizes());
  check_shape(op, "row_order", row_order, {n});
  check_dtype(op, "row_order", row_order, row_order.scalar_type() == ScalarType::Int, "int32");
  check_device(op, "row_order", row_order, "x", x);
  check_device(op, "cols", cols, "x", x);
  const Activation act = activation_of(op, activation);
  const Stream stream = current_stream(x);
  const int64_t width = csr_panel_width(batch);
  const Tensor panels = new_tensor(x, {width ? panel_count(batch, width) * width * k : 0});
  dispatch_pair(op, x, values, [&](auto x_type, auto v_type) {
    using X = typename decltype(x_type)::type;
    using V = typename decltype(v_type)::type;
    const Csr<V> w{input<V>(values),          columns, input<int64_t>(row_ptr),
                   input<int32_t>(row_order), n,       k};
    launch_csr<X, V>(strided<X>(x), output<X>(panels), batch, w, epilogue<X>(out, bias, act),
                     stream);
  });
  return out;
}

Tensor packed_linear_bitmap(const Tensor& x, const Tensor& values_in, const Tensor& words_in,
                            const Tensor& row_ptr_in, const OptionalTensor& bias_in, int64_t k,
                            const std::string& activation) {
  const char* op = "packed_linear_bitmap";
  const DeviceScope scope(x);
  const Tensor values = as_contiguous(values_in);
  const Tensor words = as_contiguous(words_in);
  const Tensor row_ptr = as_contiguous(row_ptr_in);
  const OptionalTensor bias = contiguous_bias(bias_in);
  check_dim(op, "words", words, 2);
  check_dtype(op, "words", words, words.scalar_type() == ScalarType::Short, "int16");
  const int64_t n = words.size(0), words_per_row = (k + 15) / 16;
  const Tensor out = packed_output(op, x, values, bias, n, k);
  check_shape(op, "words", words, {n, words_per_row});
  check_shape(op, "row_ptr", row_ptr, {n + 1});
  check_dtype(op, "row_ptr", row_ptr, row_ptr.scalar_type() == ScalarType::Long, "int64");
  check_device(op, "words", words, "x", x);
  check_device(op, "row_ptr", row_ptr, "x", x);
  const Activation act = activation_of(op, activation);
  const Stream stream = current_stream(x);
  dispatch_pair(op, x, values, [&](auto x_type, auto v_type) {
    using X = typename decltype(x_type)::type;
    using V = typename decltype(v_type)::type;
    const uint16_t* bits = input<uint16_t>(words);
    const bool whole_steps = words_per_row % kWordsPerStep == 0 && aligned(bits, 8);
    const Bitmap<V> w{input<V>(values), bits,       input<int64_t>(row_ptr), n, k,
                      words_per_row,    whole_steps};
    launch_bitmap<X, V>(strided<X>(x), x.size(0), w, epilogue<X>(out, bias, act), stream);
  });
  return out;
}

Tensor sampled_matmul(const Tensor& grad, const Tensor& x, const Tensor& cols_in,
                      const Tensor& row_ptr_in) {
  const char* op = "sampled_matmul";
  check_dim(op, "x", x, 2);
  const DeviceScope scope(x);
  const Tensor cols = as_contiguous(cols_in);
  const Tensor row_ptr = as_contiguous(row_ptr_in);
  const int64_t batch = x.size(0), k = x.size(1);
  const Columns columns = check_structure(op, cols, row_ptr, k);
  const int64_t n = row_ptr.numel() - 1;
  check_shape(op, "grad", grad, {batch, n});
  check_dtype(op, "grad", grad, grad.scalar_type() == x.scalar_type(), "of x's dtype");
  check_device(op, "grad", grad, "x", x);
  check_device(op, "cols", cols, "x", x);
  const Stream stream = current_stream(x);
  const Tensor out = new_tensor(x, {cols.numel()});
  const int64_t padded = batch > kLaneBatch ? panel_count(batch, kWarp) * kWarp : 0;
  const Tensor grad_panels = new_tensor(x, {padded * n});
  const Tensor x_panels = new_tensor(x, {padded * k});
  dispatch_float(op, "x", x, [&](auto type) {
    using X = typename decltype(type)::type;
    launch_sampled<X>(strided<X>(grad), strided<X>(x), output<X>(grad_panels), output<X>(x_panels),
                      batch, {columns, input<int64_t>(row_ptr), n, k}, output<X>(out), stream);
  });
  return out;
}

}  // namespace
}  // namespace sapwood::masked_matmul::device

SAPWOOD_CUDA_IMPL(m) {
  namespace ops = sapwood::masked_matmul::device;
  m.impl("masked_matmul", TORCH_BOX(&ops::masked_matmul));
  m.impl("masked_matmul_backward", TORCH_BOX(&ops::masked_matmul_backward));
  m.impl("pack_csr", TORCH_BOX(&ops::pack_csr));
  m.impl("pack_bitmap", TORCH_BOX(&ops::pack_bitmap));
  m.impl("transpose_csr", TORCH_BOX(&ops::transpose_csr));
  m.impl("packed_linear_csr", TORCH_BOX(&ops::packed_linear_csr));
  m.impl("packed_linear_bitmap", TORCH_BOX(&ops::packed_linear_bitmap));
  m.impl("sampled_matmul", TORCH_BOX(&ops::sampled_matmul));
}
