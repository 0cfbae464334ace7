// The ops over circuits: tensors in, launches of the kernels in cuda_circuit_kernels.cuh.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "logsemiring/circuit_arguments.h"
#include "logsemiring/cuda_circuit_kernels.cuh"
#include "logsemiring/cuda_tensors.cuh"

namespace sapwood::logsemiring::device {
namespace {  // for cuda.cu alone

// Checked arguments, contiguous but for x. What the tables hold is not checked: that would wait for
// the device; LogCircuit checks it when it is made.
struct CircuitCall {
  Tensor x, tables;
  OptionalTensor evidence;
  Circuit circuit;

  CircuitRows rows() const {
    if (!evidence) return {x.size(1), nullptr, 0};
    return {x.size(1), input<int64_t>(*evidence), evidence->size(1)};
  }
  template <class T>
  CircuitInput<T> in() const {
    return {input<T>(x), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
  }
};

inline CircuitCall circuit_call(const char* op, const Tensor& x, const OptionalTensor& evidence,
                                const Tensor& tables, const std::vector<int64_t>& counts) {
  const CircuitCounts n = circuit_counts(op, counts);
  check_circuit(op, x, evidence, tables, n);
  check_device(op, "circuit", tables, "x", x);
  STD_TORCH_CHECK(evidence || n.selectors == 0, "sapwood.", op,
                  ": evidence must be given for this circuit, got none");
  CircuitCall call{widened(x), as_contiguous(tables), std::nullopt, {}};
  if (evidence) {
    check_device(op, "evidence", *evidence, "x", x);
    call.evidence = as_contiguous(*evidence);
  }
  call.circuit = unpack_circuit(input<int32_t>(call.tables), n);
  return call;
}

inline Tensor log_circuit(const Tensor& x_in, const OptionalTensor& evidence, const Tensor& tables,
                          std::vector<int64_t> counts) {
  const char* op = "log_circuit";
  const DeviceScope scope(x_in);
  const CircuitCall call = circuit_call(op, x_in, evidence, tables, counts);
  const CircuitCounts& n = call.circuit.n;
  const int64_t rows = call.x.size(1), blocks = std::min(rows, kCircuitBlocks);
  const Tensor out = new_tensor(call.x, {rows, n.results});
  const Tensor values = new_tensor(call.x, {blocks, n.columns()}, ScalarType::Double);
  if (rows > 0) {
    with_type(op, call.x, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = circuit_kernel<T>;
      const CircuitState state{output<double>(values), nullptr, nullptr, nullptr, nullptr};
      SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, current_stream(call.x), call.circuit,
                     call.in<T>(), call.rows(), state, output<T>(out));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return restored(out, x_in.scalar_type());
}

inline Tensor log_circuit_backward(const Tensor& grad_in, const Tensor& x_in,
                                   const OptionalTensor& evidence, const Tensor& tables,
                                   std::vector<int64_t> counts) {
  const char* op = "log_circuit_backward";
  const DeviceScope scope(x_in);
  const CircuitCall call = circuit_call(op, x_in, evidence, tables, counts);
  const CircuitCounts& n = call.circuit.n;
  const int64_t rows = call.x.size(1), blocks = std::min(rows, kCircuitBlocks);
  check_shape(op, "grad", grad_in, {rows, n.results});
  check_like(op, "grad", grad_in, x_in);
  const Tensor grad = as_contiguous(widened(grad_in));
  const Tensor out = new_tensor(call.x, {call.x.size(0), rows, call.x.size(2)});
  const auto doubles = [&](int64_t width) {
    return new_tensor(call.x, {blocks, width}, ScalarType::Double);
  };
  const Tensor values = doubles(n.columns()), slopes = doubles(n.columns());
  const Tensor tops = doubles(n.sums), shares = doubles(n.sums);
  const Tensor lists = new_tensor(call.x, {blocks, n.sums}, ScalarType::Int);
  if (rows > 0) {
    with_type(op, call.x, [&](auto zero) {
      using T = decltype(zero);
      auto kernel = circuit_backward_kernel<T>;
      const CircuitState state{output<double>(values), output<double>(slopes), output<double>(tops),
                               output<double>(shares), output<int32_t>(lists)};
      SAPWOOD_LAUNCH(kernel, grid_of(blocks), kThreads, 0, current_stream(call.x), call.circuit,
                     call.in<T>(), call.rows(), state, input<T>(grad), output<T>(out));
      SAPWOOD_CUDA_CHECK(cudaGetLastError());
    });
  }
  return restored(out, x_in.scalar_type());
}

}  // namespace
}  // namespace sapwood::logsemiring::device
