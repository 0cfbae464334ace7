// The CPU kernels of the family as ops.
#include "common/registry.h"
#include "logsemiring/cpu_matmul.h"
#include "logsemiring/cpu_matmul_backward.h"

SAPWOOD_CPU_IMPL(m) {
  namespace ops = sapwood::logsemiring;
  m.impl("log_matmul", TORCH_BOX(&ops::log_matmul));
  m.impl("log_matmul_backward", TORCH_BOX(&ops::log_matmul_backward));
  m.impl("log_matmul_double_backward", TORCH_BOX(&ops::log_matmul_double_backward));
}
