// Checks of the arguments of ops over circuits, the same on every device.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/tensor.h"
#include "logsemiring/circuit.h"

namespace sapwood::logsemiring {

inline CircuitCounts circuit_counts(const char* op, const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(static_cast<int64_t>(counts.size()) == kCircuitCounts, "sapwood.", op,
                  ": counts must have ", kCircuitCounts, " entries, got ", counts.size());
  for (const int64_t count : counts) {
    check_int32(op, "entries of the circuit", count);
    STD_TORCH_CHECK(count >= 0, "sapwood.", op, ": counts must not be negative, got ", count);
  }
  return {counts[0], counts[1], counts[2], counts[3], counts[4],
          counts[5], counts[6], counts[7], counts[8]};
}

// x (m, B, k), evidence (B, E), and the packed tables.
inline void check_circuit(const char* op, const Tensor& x, const std::optional<Tensor>& evidence,
                          const Tensor& tables, const CircuitCounts& n) {
  check_dim(op, "x", x, 3);
  STD_TORCH_CHECK(x.size(0) * x.size(2) == n.inputs, "sapwood.", op, ": x must have ", n.inputs,
                  " inputs for each row, got shape ", shape_text(x.sizes()));
  check_dtype(op, "circuit", tables, tables.scalar_type() == ScalarType::Int, "int32");
  check_shape(op, "circuit", tables, {n.packed()});
  if (!evidence) return;
  check_shape(op, "evidence", *evidence, {x.size(1), evidence->dim() == 2 ? evidence->size(1) : 0});
  check_dtype(op, "evidence", *evidence, evidence->scalar_type() == ScalarType::Long, "int64");
}

}  // namespace sapwood::logsemiring
