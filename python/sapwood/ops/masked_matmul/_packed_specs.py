"""Declarations of the packed ops: packing, the products of each format, the sampled product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.ops.masked_matmul._specs import FAMILY, _fold
from sapwood.reference import masked_matmul as reference

# packing ------------------------------------------------------------------------------------------


def _no_vmap(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
    raise NotImplementedError(
        "sapwood.pack_sparse: masks of a vmapped batch keep different numbers of weights; "
        "pack each weight outside of vmap"
    )


def _kept(mask: Tensor) -> Any:
    size: Any = torch.library.get_ctx().new_dynamic_size()
    torch._check(size <= mask.numel())
    return size


def _column_dtype(k: int) -> torch.dtype:
    return torch.int16 if k <= 65536 else torch.int32


def _fake_pack_csr(weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    nnz, (n, k) = _kept(mask), weight.shape
    return (
        weight.new_empty(nnz),
        weight.new_empty(nnz, dtype=_column_dtype(k)),
        weight.new_empty(n + 1, dtype=torch.int64),
        weight.new_empty(n, dtype=torch.int32),
    )


def _fake_pack_bitmap(weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    n, k = weight.shape
    return (
        weight.new_empty(_kept(mask)),
        weight.new_empty(n, (k + 15) // 16, dtype=torch.int16),
        weight.new_empty(n + 1, dtype=torch.int64),
    )


def _fake_pack_sell(weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    steps: Any = torch.library.get_ctx().new_dynamic_size()
    slices = (weight.shape[0] + reference.SLICE - 1) // reference.SLICE
    return (
        weight.new_empty(steps, reference.SLICE),
        weight.new_empty(steps, reference.SLICE, dtype=torch.uint8),
        weight.new_empty(steps, dtype=torch.int32),
        weight.new_empty(slices + 1, dtype=torch.int64),
    )


def _fake_transpose_csr(cols: Tensor, row_ptr: Tensor, k: int) -> tuple[Tensor, ...]:
    nnz, n = cols.shape[0], row_ptr.shape[0] - 1
    return (
        cols.new_empty(nnz, dtype=_column_dtype(n)),
        cols.new_empty(k + 1, dtype=torch.int64),
        cols.new_empty(k, dtype=torch.int32),
        cols.new_empty(nnz, dtype=torch.int64),
    )


pack_csr = define_op(OpSpec("pack_csr", FAMILY, _fake_pack_csr, reference.pack_csr, vmap=_no_vmap))
pack_bitmap = define_op(
    OpSpec("pack_bitmap", FAMILY, _fake_pack_bitmap, reference.pack_bitmap, vmap=_no_vmap)
)
pack_sell = define_op(
    OpSpec("pack_sell", FAMILY, _fake_pack_sell, reference.pack_sell, vmap=_no_vmap)
)
transpose_csr = define_op(
    OpSpec("transpose_csr", FAMILY, _fake_transpose_csr, reference.transpose_csr, vmap=_no_vmap)
)

# products -----------------------------------------------------------------------------------------


def _vmap_product(bias_at: int) -> Callable[..., tuple[Tensor, int]]:
    """x may be batched at no cost, the bias by adding it afterwards; other arguments in a loop."""

    def rule(
        call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[Tensor, int]:
        others = in_dims[1:bias_at] + in_dims[bias_at + 1 :]
        if in_dims[0] is None or any(d is not None for d in others):
            return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
        folded: list[Any] = [_fold(args[0], in_dims[0]), *args[1:]]
        bias_dim = in_dims[bias_at]
        if bias_dim is None:
            return call(*folded).unflatten(0, (info.batch_size, -1)), 0
        activation = next(i for i, a in enumerate(args) if isinstance(a, str))
        folded[bias_at], folded[activation] = None, "none"
        y = call(*folded).unflatten(0, (info.batch_size, -1))
        y = y + args[bias_at].movedim(bias_dim, 0)[:, None]
        return reference.ACTIVATIONS[args[activation]](y), 0

    return rule


def _fake_csr(x: Tensor, values: Tensor, cols: Tensor, row_ptr: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], row_ptr.shape[0] - 1)


def _fake_sell(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[5])


def _setup_csr(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, cols, row_ptr, _, _, ctx.k, ctx.activation, *transposed = inputs
    ctx.save_for_backward(x, values, cols, row_ptr, *transposed)


def _backward_csr(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.activation != "none":
        raise NotImplementedError(
            f"sapwood.packed_linear_csr: no gradient through a fused {ctx.activation}; "
            "call it with activation 'none' and apply the activation afterwards"
        )
    x, values, cols, row_ptr, *transposed = ctx.saved_tensors
    need_x, need_values = ctx.needs_input_grad[:2]
    grad_x = grad_values = None
    if need_x:
        if transposed[0] is None:
            transposed = transpose_csr(cols, row_ptr, ctx.k)
        cols_t, row_ptr_t, row_order_t, perm = transposed
        grad_x = packed_linear_csr(
            *(
                grad,
                values.index_select(0, perm),
                cols_t,
                row_ptr_t,
                row_order_t,
                None,
                grad.shape[1],
                "none",
            ),
            *[None] * 4,
        )
    if need_values:
        grad_values = sampled_matmul(grad, x, cols, row_ptr).to(values.dtype)
    grad_bias = grad.sum(0) if ctx.needs_input_grad[5] else None
    return grad_x, grad_values, None, None, None, grad_bias, *[None] * 6


def _fake_sampled(grad: Tensor, x: Tensor, cols: Tensor, row_ptr: Tensor) -> Tensor:
    return x.new_empty(cols.shape[0])


def _setup_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_sampled(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, cols, row_ptr = ctx.saved_tensors
    n, k = grad.shape[1], x.shape[1]
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        order = torch.arange(n, dtype=torch.int32, device=x.device)
        grad_grad = packed_linear_csr(
            *(x, tangent, cols, row_ptr, order, None, k, "none"), *[None] * 4
        )
    if ctx.needs_input_grad[1]:
        cols_t, row_ptr_t, row_order_t, perm = transpose_csr(cols, row_ptr, k)
        grad_x = packed_linear_csr(
            *(grad, tangent.index_select(0, perm), cols_t, row_ptr_t, row_order_t, None, n, "none"),
            *[None] * 4,
        )
    return grad_grad, grad_x, None, None


packed_linear_csr = define_op(
    OpSpec(
        "packed_linear_csr",
        FAMILY,
        fake=_fake_csr,
        reference=reference.packed_linear_csr,
        vmap=_vmap_product(bias_at=5),
        setup=_setup_csr,
        backward=_backward_csr,
    )
)
sampled_matmul = define_op(
    OpSpec(
        "sampled_matmul",
        FAMILY,
        fake=_fake_sampled,
        reference=reference.sampled_matmul,
        vmap=loop_over_batch,
        setup=_setup_sampled,
        backward=_backward_sampled,
    )
)
packed_linear_bitmap = define_op(
    OpSpec(
        "packed_linear_bitmap",
        FAMILY,
        fake=_fake_csr,
        reference=reference.packed_linear_bitmap,
        vmap=_vmap_product(bias_at=4),
    )
)
packed_linear_sell = define_op(
    OpSpec(
        "packed_linear_sell",
        FAMILY,
        fake=_fake_sell,
        reference=reference.packed_linear_sell,
        vmap=_vmap_product(bias_at=5),
    )
)
