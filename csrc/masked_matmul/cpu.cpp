// The CPU kernels of the family as ops. masked_matmul itself is one fused masking pass and the
// platform's GEMM; the packed products are our own loops (cpu_packed.h).
#include "common/registry.h"
#include "masked_matmul/cpu_pack.h"
#include "masked_matmul/cpu_packed.h"

namespace sapwood::masked_matmul {
namespace {

// out = where(mask, weight, 0); all contiguous, out may be weight.
void mask_into(const Tensor& weight, const Tensor& mask, const Tensor& out) {
  with_bits("masked_matmul", weight, [&](auto bits) {
    using Bits = decltype(bits);
    const Bits* from = data<Bits>(weight);
    const uint8_t* keep = data<uint8_t>(mask);
    Bits* to = mutable_data<Bits>(out);
    parallel_range(weight.numel(), kPackGrain, [&](int64_t begin, int64_t end) {
      SAPWOOD_ISA_CALL(apply_mask(from + begin, keep + begin, to + begin, end - begin));
    });
  });
}

Tensor masked_weight(const DenseSource& source) {
  const Tensor product = new_tensor(source.weight, {source.n, source.k});
  mask_into(source.weight, source.mask, product);
  return product;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor masked_matmul(const Tensor& x, const Tensor& weight, const Tensor& mask,
                     const std::optional<Tensor>& bias, bool) {
  const DenseSource source = dense_source("masked_matmul", weight, mask);
  check_dim("masked_matmul", "input", x, 2);
  return linear(x, masked_weight(source), bias);
}

// dX = grad (W o M); dW = grad^T x, masked in place unless the dense gradient is wanted.
std::tuple<Tensor, Tensor> masked_matmul_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& weight, const Tensor& mask,
                                                  bool need_x, bool need_weight,
                                                  bool dense_weight_grad) {
  const DenseSource source = dense_source("masked_matmul_backward", weight, mask);
  Tensor grad_x = new_tensor(x, {0});
  Tensor grad_weight = new_tensor(weight, {0});
  if (need_x) grad_x = torch::stable::matmul(grad, masked_weight(source));
  if (need_weight) {
    const Tensor product = torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x);
    grad_weight = contiguous_as(product, product.scalar_type());
    if (!dense_weight_grad) mask_into(grad_weight, source.mask, grad_weight);
  }
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace sapwood::masked_matmul

SAPWOOD_CPU_IMPL(m) {
  using namespace sapwood::masked_matmul;
  m.impl("masked_matmul", TORCH_BOX(&masked_matmul));
  m.impl("masked_matmul_backward", TORCH_BOX(&masked_matmul_backward));
  m.impl("pack_csr", TORCH_BOX(&pack_csr));
  m.impl("pack_bitmap", TORCH_BOX(&pack_bitmap));
  m.impl("pack_sell", TORCH_BOX(&pack_sell));
  m.impl("transpose_csr", TORCH_BOX(&transpose_csr));
  m.impl("packed_linear_csr", TORCH_BOX(&packed_linear_csr));
  m.impl("packed_linear_bitmap", TORCH_BOX(&packed_linear_bitmap));
  m.impl("packed_linear_sell", TORCH_BOX(&packed_linear_sell));
  m.impl("sampled_matmul", TORCH_BOX(&sampled_matmul));
}
