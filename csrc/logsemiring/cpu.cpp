// The CPU kernels of the family as ops.
#include "common/registry.h"
#include "logsemiring/cpu_circuit.h"
#include "logsemiring/cpu_matmul.h"
#include "logsemiring/cpu_matmul_backward.h"
#include "logsemiring/cpu_path.h"
#include "logsemiring/cpu_segment.h"
#include "logsemiring/cpu_tropical.h"

SAPWOOD_CPU_IMPL(m) {
  namespace ops = sapwood::logsemiring;
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
