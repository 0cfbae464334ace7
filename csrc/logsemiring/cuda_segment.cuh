// The ops over segments: tensors in, launches of the kernels in cuda_sequence.cuh.
#pragma once

#include <optional>
#include <tuple>

#include "logsemiring/cuda_sequence.cuh"
#include "logsemiring/cuda_tensors.cuh"

namespace sapwood::logsemiring::device {
namespace {  // for cuda.cu alone

// Checked arguments of an op over segments, contiguous. The contents of ptr and order are not
// checked: that would wait for the device; SegmentPlan checks them when it is made.
struct SegmentArguments {
  Tensor x, ptr;
  OptionalTensor order;

  Division division() const {
    return {input<int64_t>(ptr), order ? input<int64_t>(*order) : nullptr,
            x.size(0),           ptr.numel() - 1,
            x.size(2),           x.size(1)};
  }
};

inline SegmentArguments segment_arguments(const char* op, const Tensor& x_in, const Tensor& ptr_in,
                                          const OptionalTensor& order_in) {
  check_dim(op, "x", x_in, 3);
  check_dim(op, "ptr", ptr_in, 1);
  check_dtype(op, "ptr", ptr_in, ptr_in.scalar_type() == ScalarType::Long, "int64");
  check_device(op, "ptr", ptr_in, "x", x_in);
  STD_TORCH_CHECK(ptr_in.numel() > 0, "sapwood.", op, ": ptr must not be empty, got (0,)");
  SegmentArguments found{as_contiguous(widened(x_in)), as_contiguous(ptr_in), std::nullopt};
  if (order_in) {
    check_shape(op, "order", *order_in, {x_in.size(1)});
    check_dtype(op, "order", *order_in, order_in->scalar_type() == ScalarType::Long, "int64");
    check_device(op, "order", *order_in, "x", x_in);
    found.order = as_contiguous(*order_in);
  }
  return found;
}

inline unsigned warp_blocks(const Division& d) {
  const int64_t warps = d.outer * d.count * d.inner, per_block = kThreads / kWarp;
  return grid_of((warps + per_block - 1) / per_block);
}

// Values (O, S, I), or weights (O, n, I), times a scale (O, S, I) if there is one.
inline Tensor segments(const char* op, const Tensor& x_in, const Tensor& ptr_in,
                       const OptionalTensor& order_in, bool weights,
                       const OptionalTensor& scale_in) {
  const DeviceScope scope(x_in);
  const SegmentArguments given = segment_arguments(op, x_in, ptr_in, order_in);
  const Tensor& x = given.x;
  const Division d = given.division();
  OptionalTensor scale;
  if (scale_in) {
    check_shape(op, "grad", *scale_in, {x.size(0), d.count, x.size(2)});
    check_like(op, "grad", *scale_in, x_in);
    check_device(op, "grad", *scale_in, "x", x_in);
    scale = as_contiguous(widened(*scale_in));
  }
  const Tensor out = new_tensor(x, {x.size(0), weights ? x.size(1) : d.count, x.size(2)});
  if (warp_blocks(d) > 0) {
    with_type(op, x, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = segment_kernel<T>;
      T *values = weights ? nullptr : output<T>(out), *shares = weights ? output<T>(out) : nullptr;
      SAPWOOD_LAUNCH(kernel, warp_blocks(d), kThreads, 0, current_stream(x), input<T>(x), d,
                     scale ? input<T>(*scale) : nullptr, values, shares);
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return restored(out, x_in.scalar_type());
}

inline std::tuple<Tensor, Tensor> segment_max(const Tensor& x_in, const Tensor& ptr,
                                              const OptionalTensor& order) {
  const char* op = "segment_max";
  const DeviceScope scope(x_in);
  const SegmentArguments given = segment_arguments(op, x_in, ptr, order);
  const Division d = given.division();
  const Tensor values = new_tensor(given.x, {d.outer, d.count, d.inner});
  const Tensor indices = new_tensor(given.x, {d.outer, d.count, d.inner}, ScalarType::Long);
  if (warp_blocks(d) > 0) {
    with_type(op, given.x, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = segment_max_kernel<T>;
      SAPWOOD_LAUNCH(kernel, warp_blocks(d), kThreads, 0, current_stream(given.x),
                     input<T>(given.x), d, output<T>(values), output<int64_t>(indices));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return {restored(values, x_in.scalar_type()), indices};
}

inline Tensor segment_logsumexp(const Tensor& x, const Tensor& ptr, const OptionalTensor& order) {
  return segments("segment_logsumexp", x, ptr, order, false, std::nullopt);
}

inline Tensor segment_softmax(const Tensor& x, const Tensor& ptr, const OptionalTensor& order) {
  return segments("segment_softmax", x, ptr, order, true, std::nullopt);
}

inline Tensor segment_logsumexp_backward(const Tensor& grad, const Tensor& x, const Tensor& ptr,
                                         const OptionalTensor& order) {
  return segments("segment_logsumexp_backward", x, ptr, order, true, grad);
}

inline std::tuple<Tensor, Tensor> segment_logsumexp_double_backward(const Tensor& grad_in,
                                                                    const Tensor& x_in,
                                                                    const Tensor& tangent_in,
                                                                    const Tensor& ptr,
                                                                    const OptionalTensor& order) {
  const char* op = "segment_logsumexp_double_backward";
  const DeviceScope scope(x_in);
  const SegmentArguments given = segment_arguments(op, x_in, ptr, order);
  const Division d = given.division();
  check_shape(op, "grad", grad_in, {d.outer, d.count, d.inner});
  check_shape(op, "tangent", tangent_in, x_in.sizes());
  check_like(op, "grad", grad_in, x_in);
  check_like(op, "tangent", tangent_in, x_in);
  const Tensor grad = as_contiguous(widened(grad_in));
  const Tensor tangent = as_contiguous(widened(tangent_in));
  const Tensor mean = new_tensor(given.x, {d.outer, d.count, d.inner});
  const Tensor out = new_tensor(given.x, {d.outer, d.entries, d.inner});
  if (warp_blocks(d) > 0) {
    with_type(op, given.x, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = segment_second_kernel<T>;
      SAPWOOD_LAUNCH(kernel, warp_blocks(d), kThreads, 0, current_stream(given.x),
                     input<T>(given.x), input<T>(tangent), d, input<T>(grad), output<T>(mean),
                     output<T>(out));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return {restored(mean, x_in.scalar_type()), restored(out, x_in.scalar_type())};
}

}  // namespace
}  // namespace sapwood::logsemiring::device
