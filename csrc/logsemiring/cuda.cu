// logsemiring on CUDA: tensors in, launches of the kernels in cuda_*.cuh, registration.
#include <algorithm>
#include <tuple>

#include "common/registry.h"
#include "logsemiring/cuda_circuit.cuh"
#include "logsemiring/cuda_segment.cuh"

namespace sapwood::logsemiring::device {
namespace {

Shape product_shape(const char* op, const Tensor& a, const Tensor& b) {
  check_dim(op, "a", a, 3);
  check_dim(op, "b", b, 3);
  check_shape(op, "b", b, {a.size(0), a.size(2), b.size(2)});
  check_like(op, "b", b, a);
  return {a.size(0), a.size(1), b.size(2), a.size(2)};
}

Tensor log_matmul(const Tensor& a_in, const Tensor& b_in, bool /*exact: always*/) {
  const char* op = "log_matmul";
  const Shape s = product_shape(op, a_in, b_in);
  const DeviceScope scope(a_in);
  const Tensor a = widened(a_in), b = widened(b_in);
  const Tensor c = new_tensor(a, {s.batch, s.m, s.n});
  with_type(op, a, [&](auto zero) {
    using T = decltype(zero);
    const Batched<T> left = batched<T>(a), right = batched<T>(b).transposed();
    launch_reduce<T, false>(left, right, left, right, s, {output<T>(c), nullptr, nullptr, nullptr},
                            current_stream(a));
  });
  return restored(c, a_in.scalar_type());
}

// Both gradients of one order; `mean` and the tangents are read in the second.
template <class T, bool second>
void gradients(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& ta,
               const Tensor& tb, const Tensor& mean, Shape s, T* da, T* db) {
  const Stream stream = current_stream(a);
  const Tensor shift = new_tensor(a, {s.batch, s.m, s.n});
  const Tensor weight = new_tensor(a, {s.batch, s.m, s.n});
  const Batched<T> left = batched<T>(a), right = batched<T>(b), g = batched<T>(grad);
  const Batched<T> h = batched<T>(ta), k = batched<T>(tb), q = batched<T>(mean);
  const Batched<T> top = batched<T>(shift), w = batched<T>(weight);
  launch_reduce<T, second>(
      left, right.transposed(), h, k.transposed(), s,
      {nullptr, output<T>(shift), output<T>(weight), second ? output<T>(mean) : nullptr}, stream);
  if (da != nullptr) {
    launch_gradient<T, second>(left, right, h, k, top, w, q, g, s, da, s.k, 1, stream);
  }
  if (db != nullptr) {
    launch_gradient<T, second>(right.transposed(), left.transposed(), k.transposed(),
                               h.transposed(), top.transposed(), w.transposed(), q.transposed(),
                               g.transposed(), {s.batch, s.n, s.m, s.k}, db, 1, s.n, stream);
  }
}

void check_grad(const char* op, const Tensor& grad, const Tensor& a, const Shape& s) {
  check_shape(op, "grad", grad, {s.batch, s.m, s.n});
  check_like(op, "grad", grad, a);
}

std::tuple<Tensor, Tensor> log_matmul_backward(const Tensor& grad_in, const Tensor& a_in,
                                               const Tensor& b_in, bool /*exact*/, bool need_a,
                                               bool need_b) {
  const char* op = "log_matmul_backward";
  const Shape s = product_shape(op, a_in, b_in);
  check_grad(op, grad_in, a_in, s);
  const DeviceScope scope(a_in);
  const Tensor a = widened(a_in), b = widened(b_in), grad = widened(grad_in);
  Tensor da = new_tensor(a, {0}), db = new_tensor(a, {0});
  if (need_a) da = new_tensor(a, {s.batch, s.m, s.k});
  if (need_b) db = new_tensor(a, {s.batch, s.k, s.n});
  with_type(op, a, [&](auto zero) {
    using T = decltype(zero);
    gradients<T, false>(grad, a, b, a, b, grad, s, need_a ? output<T>(da) : nullptr,
                        need_b ? output<T>(db) : nullptr);
  });
  const ScalarType type = a_in.scalar_type();
  return {restored(da, type), restored(db, type)};
}

std::tuple<Tensor, Tensor, Tensor> log_matmul_double_backward(const Tensor& grad_in,
                                                              const Tensor& a_in,
                                                              const Tensor& b_in,
                                                              const Tensor& ta_in,
                                                              const Tensor& tb_in) {
  const char* op = "log_matmul_double_backward";
  const Shape s = product_shape(op, a_in, b_in);
  check_grad(op, grad_in, a_in, s);
  check_shape(op, "tangent_a", ta_in, a_in.sizes());
  check_shape(op, "tangent_b", tb_in, b_in.sizes());
  check_like(op, "tangent_a", ta_in, a_in);
  check_like(op, "tangent_b", tb_in, a_in);
  const DeviceScope scope(a_in);
  const Tensor a = widened(a_in), b = widened(b_in), grad = widened(grad_in);
  const Tensor ta = widened(ta_in), tb = widened(tb_in);
  const Tensor mean = new_tensor(a, {s.batch, s.m, s.n});
  const Tensor da = new_tensor(a, {s.batch, s.m, s.k});
  const Tensor db = new_tensor(a, {s.batch, s.k, s.n});
  with_type(op, a, [&](auto zero) {
    using T = decltype(zero);
    gradients<T, true>(grad, a, b, ta, tb, mean, s, output<T>(da), output<T>(db));
  });
  const ScalarType type = a_in.scalar_type();
  return {restored(mean, type), restored(da, type), restored(db, type)};
}

std::tuple<Tensor, Tensor> max_matmul(const Tensor& a_in, const Tensor& b_in) {
  const char* op = "max_matmul";
  const Shape s = product_shape(op, a_in, b_in);
  const DeviceScope scope(a_in);
  const Tensor a = widened(a_in), b = widened(b_in);
  const Tensor values = new_tensor(a, {s.batch, s.m, s.n});
  const Tensor indices = new_tensor(a, {s.batch, s.m, s.n}, ScalarType::Long);
  const int64_t blocks = (values.numel() + kThreads - 1) / kThreads;
  if (blocks > 0) {
    with_type(op, a, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = max_kernel<T>;
      SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, current_stream(a), batched<T>(a),
                     batched<T>(b), s, output<T>(values), output<int64_t>(indices));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return {restored(values, a_in.scalar_type()), indices};
}

Tensor sample_matmul(const Tensor& a_in, const Tensor& b_in, int64_t num_samples, int64_t seed) {
  const char* op = "sample_matmul";
  const Shape s = product_shape(op, a_in, b_in);
  const DeviceScope scope(a_in);
  const Tensor a = widened(a_in), b = widened(b_in);
  const Tensor out = new_tensor(a, {num_samples, s.batch, s.m, s.n}, ScalarType::Long);
  const int64_t blocks = (out.numel() + kThreads - 1) / kThreads;
  if (blocks == 0) return out;
  with_type(op, a, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = sample_kernel<T>;
    SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, current_stream(a), batched<T>(a),
                   batched<T>(b), s, num_samples, static_cast<uint64_t>(seed),
                   output<int64_t>(out));
    SAPWOOD_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

template <class T>
Chain<T> chain(const Tensor& t) {
  return {input<T>(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Tensor log_scan(const Tensor& t_in, const Tensor& init, bool maximum) {
  const char* op = "log_scan";
  check_dim(op, "t", t_in, 4);
  check_dim(op, "init", init, 3);
  check_shape(op, "t", t_in, {t_in.size(0), t_in.size(1), t_in.size(2), t_in.size(2)});
  check_shape(op, "init", init, {t_in.size(0), init.size(1), t_in.size(2)});
  check_device(op, "init", init, "t", t_in);
  const DeviceScope scope(t_in);
  const Tensor t = widened(t_in);
  const ChainShape s{t.size(0), t.size(1), init.size(1), t.size(2), maximum};
  const Tensor states = new_tensor(t, {s.batch, s.length + 1, s.rows, s.k}, ScalarType::Double);
  Tensor first = torch::stable::select(states, 1, 0);
  torch::stable::copy_(first, init);
  if (states.numel() == 0) return states;
  with_type(op, t, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = scan_kernel<T>;
    SAPWOOD_LAUNCH(kernel, grid_of(s.batch), kThreads, 0, current_stream(t), chain<T>(t), s,
                   output<double>(states));
    SAPWOOD_CUDA_CHECK(cudaGetLastError());
  });
  return states;
}

std::tuple<Tensor, Tensor> log_scan_backward(const Tensor& grad_in, const Tensor& t_in,
                                             const Tensor& states_in, bool maximum) {
  const char* op = "log_scan_backward";
  check_dim(op, "t", t_in, 4);
  check_dim(op, "states", states_in, 4);
  check_shape(op, "grad", grad_in, states_in.sizes());
  check_device(op, "states", states_in, "t", t_in);
  check_device(op, "grad", grad_in, "t", t_in);
  constexpr int64_t kMost = int64_t{0xffff};  // the kernel numbers the entries of a step in 32 bits
  STD_TORCH_CHECK(t_in.size(2) <= kMost && states_in.size(2) * states_in.size(3) <= kMost * kMost,
                  "sapwood.", op, ": t and states must have steps of fewer than 2^32 entries, got ",
                  t_in.size(2), " states and ", states_in.size(2), " rows");
  const DeviceScope scope(t_in);
  const Tensor t = widened(t_in);
  const Tensor states = as_contiguous(torch::stable::to(states_in, ScalarType::Double));
  const Tensor grad = as_contiguous(torch::stable::to(grad_in, ScalarType::Double));
  const ChainShape s{t.size(0), t.size(1), states.size(2), t.size(2), maximum};
  check_shape(op, "states", states, {s.batch, s.length + 1, s.rows, s.k});
  const Tensor dt = new_tensor(t, {s.batch, s.length, s.k, s.k});
  const Tensor dinit = new_tensor(states, {s.batch, s.rows, s.k});
  const Tensor buffers = new_tensor(states, {s.batch, 4, s.rows, s.k});
  if (s.batch > 0) {
    with_type(op, t, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = scan_backward_kernel<T>;
      SAPWOOD_LAUNCH(kernel, grid_of(s.batch), kThreads, 0, current_stream(t), chain<T>(t), s,
                     input<double>(states), input<double>(grad), output<double>(buffers),
                     output<T>(dt), output<double>(dinit));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  const ScalarType type = t_in.scalar_type();
  return {restored(dt, type), restored(dinit, type)};
}

Tensor log_scan_path(const Tensor& t_in, const Tensor& states_in, const Tensor& final_in,
                     int64_t num_samples, int64_t seed, bool maximum) {
  const char* op = "log_scan_path";
  check_dim(op, "t", t_in, 4);
  const ChainShape s{t_in.size(0), t_in.size(1), 1, t_in.size(2), maximum};
  check_shape(op, "t", t_in, {s.batch, s.length, s.k, s.k});
  check_shape(op, "states", states_in, {s.batch, s.length + 1, s.k});
  check_shape(op, "final", final_in, {s.batch, s.k});
  check_device(op, "states", states_in, "t", t_in);
  check_device(op, "final", final_in, "t", t_in);
  const DeviceScope scope(t_in);
  const Tensor t = widened(t_in);
  const Tensor states = as_contiguous(torch::stable::to(states_in, ScalarType::Double));
  const Tensor end = as_contiguous(torch::stable::to(final_in, ScalarType::Double));
  const Tensor out = new_tensor(t, {num_samples, s.batch, s.length + 1}, ScalarType::Long);
  const int64_t blocks = (num_samples * s.batch + kThreads - 1) / kThreads;
  if (blocks == 0) return out;
  with_type(op, t, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = path_kernel<T>;
    SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, current_stream(t), chain<T>(t), s,
                   input<double>(states), input<double>(end), num_samples,
                   static_cast<uint64_t>(seed), output<int64_t>(out));
    SAPWOOD_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace sapwood::logsemiring::device

SAPWOOD_CUDA_IMPL(m) {
  namespace ops = sapwood::logsemiring::device;
  m.impl("log_matmul", TORCH_BOX(&ops::log_matmul));
  m.impl("log_matmul_backward", TORCH_BOX(&ops::log_matmul_backward));
  m.impl("log_matmul_double_backward", TORCH_BOX(&ops::log_matmul_double_backward));
  m.impl("max_matmul", TORCH_BOX(&ops::max_matmul));
  m.impl("sample_matmul", TORCH_BOX(&ops::sample_matmul));
  m.impl("segment_logsumexp", TORCH_BOX(&ops::segment_logsumexp));
  m.impl("segment_logsumexp_backward", TORCH_BOX(&ops::segment_logsumexp_backward));
  m.impl("segment_logsumexp_double_backward", TORCH_BOX(&ops::segment_logsumexp_double_backward));
  m.impl("segment_softmax", TORCH_BOX(&ops::segment_softmax));
  m.impl("segment_max", TORCH_BOX(&ops::segment_max));
  m.impl("log_scan", TORCH_BOX(&ops::log_scan));
  m.impl("log_scan_backward", TORCH_BOX(&ops::log_scan_backward));
  m.impl("log_circuit", TORCH_BOX(&ops::log_circuit));
  m.impl("log_circuit_backward", TORCH_BOX(&ops::log_circuit_backward));
  m.impl("log_scan_path", TORCH_BOX(&ops::log_scan_path));
}
