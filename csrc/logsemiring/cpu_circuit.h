// Sum-product circuits on the CPU: every row is walked on its own.
#pragma once

#include <optional>
#include <vector>

#include "logsemiring/circuit_arguments.h"
#include "logsemiring/cpu_tensors.h"
#include "logsemiring/kernel_circuit.h"

namespace sapwood::logsemiring {

// Checked arguments of an op over a circuit, contiguous but for x (m, B, k).
struct CircuitArguments {
  Tensor tables;
  std::optional<Tensor> evidence;
  Circuit circuit;
  int64_t rows, evidence_columns;

  const int64_t* evidence_of(int64_t row) const {
    return evidence ? data<int64_t>(*evidence) + row * evidence_columns : nullptr;
  }
};

inline CircuitArguments circuit_arguments(const char* op, const Tensor& x,
                                          const std::optional<Tensor>& evidence,
                                          const Tensor& tables,
                                          const std::vector<int64_t>& counts) {
  const CircuitCounts n = circuit_counts(op, counts);
  check_circuit(op, x, evidence, tables, n);
  check_floating(op, "x", x);
  CircuitArguments found{as_contiguous(tables), std::nullopt, {}, x.size(1), 0};
  if (evidence) {
    found.evidence = as_contiguous(*evidence);
    found.evidence_columns = evidence->size(1);
  }
  found.circuit = unpack_circuit(data<int32_t>(found.tables), n);
  STD_TORCH_CHECK(circuit_is_sound(found.circuit, found.evidence_columns), "sapwood.", op,
                  ": circuit must hold the tables of a LogCircuit, and evidence the columns that "
                  "they read, got other values");
  return found;
}

// f(row, walk) for every row, with the inputs of x in the values of the walk.
template <class T, class F>
void over_rows(const CircuitArguments& given, const Tensor& x, const F& f) {
  const Circuit& c = given.circuit;
  const int64_t blocks = x.size(0), width = x.size(2), longest = longest_list(c);
  const int64_t work = c.n.inputs + c.n.sums * (8 + c.n.terms / std::max<int64_t>(1, c.n.lists));
  const T* from = data<T>(x);
  parallel_range(given.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)),
                 [&](int64_t begin, int64_t end) {
                   Scratch<double> wide(2 * c.n.columns() + longest);
                   Scratch<T> narrow(longest + kStrip<T>);
                   const CircuitWalk<T> w{wide.get(), wide.get() + c.n.columns(),
                                          wide.get() + 2 * c.n.columns(), narrow.get()};
                   for (int64_t row = begin; row < end; ++row) {
                     for (int64_t b = 0; b < blocks; ++b) {
                       const T* block = from + b * x.stride(0) + row * x.stride(1);
                       for (int64_t i = 0; i < width; ++i) {
                         w.values[b * width + i] = static_cast<double>(block[i * x.stride(2)]);
                       }
                     }
                     f(row, w);
                   }
                 });
}

// (B, R) from x (m, B, k).
inline Tensor log_circuit(const Tensor& x_in, const std::optional<Tensor>& evidence,
                          const Tensor& tables, std::vector<int64_t> counts) {
  const CircuitArguments given = circuit_arguments("log_circuit", x_in, evidence, tables, counts);
  const Circuit& c = given.circuit;
  const Tensor x = as_compute(x_in);
  const Tensor out = new_tensor(x, {given.rows, c.n.results});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data<T>(out);
    over_rows<T>(given, x, [&](int64_t row, const CircuitWalk<T>& w) {
      circuit_row(c, given.evidence_of(row), w);
      for (int64_t r = 0; r < c.n.results; ++r) {
        to[row * c.n.results + r] = static_cast<T>(w.values[c.results[r]]);
      }
    });
  });
  return in_type(out, x_in.scalar_type());
}

// The gradient (m, B, k) of x from grad (B, R).
inline Tensor log_circuit_backward(const Tensor& grad_in, const Tensor& x_in,
                                   const std::optional<Tensor>& evidence, const Tensor& tables,
                                   std::vector<int64_t> counts) {
  const char* op = "log_circuit_backward";
  const CircuitArguments given = circuit_arguments(op, x_in, evidence, tables, counts);
  const Circuit& c = given.circuit;
  check_shape(op, "grad", grad_in, {given.rows, c.n.results});
  check_like(op, "grad", grad_in, x_in);
  const Tensor x = as_compute(x_in), grad = as_contiguous(as_compute(grad_in));
  const int64_t blocks = x.size(0), width = x.size(2);
  const Tensor out = new_tensor(x, {blocks, given.rows, width});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* slopes = data<T>(grad);
    T* to = mutable_data<T>(out);
    over_rows<T>(given, x, [&](int64_t row, const CircuitWalk<T>& w) {
      circuit_row(c, given.evidence_of(row), w);
      std::fill_n(w.slopes, c.n.columns(), 0.0);
      for (int64_t r = 0; r < c.n.results; ++r) {
        w.slopes[c.results[r]] += static_cast<double>(slopes[row * c.n.results + r]);
      }
      circuit_row_back(c, given.evidence_of(row), w);
      for (int64_t i = 0; i < c.n.inputs; ++i) {
        to[(i / width * given.rows + row) * width + i % width] = static_cast<T>(w.slopes[i]);
      }
    });
  });
  return in_type(out, x_in.scalar_type());
}

}  // namespace sapwood::logsemiring
