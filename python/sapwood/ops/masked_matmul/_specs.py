"""Declarations of the family's ops: fakes, derivatives and vmap rules. B batch, K in, N out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import masked_matmul as reference

FAMILY = "masked_matmul"


def _fold(x: Tensor, dim: int) -> Tensor:
    """Moves a vmapped dimension to the front and merges it with the batch."""
    return x.movedim(dim, 0).flatten(0, 1)


# masked_matmul ------------------------------------------------------------------------------------


def _fake_masked_matmul(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_weight_grad: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_masked_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _, ctx.dense_weight_grad = inputs
    ctx.save_for_backward(x, weight, mask)


def _backward_masked_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if need_x or need_weight:
        grad_x, grad_weight = masked_matmul_backward(
            grad, x, weight, mask, need_x, need_weight, ctx.dense_weight_grad
        )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        None,
        grad.sum(0) if need_bias else None,
        None,
    )


def _vmap_masked_matmul(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    x, weight, mask, bias, dense_weight_grad = args
    x_dim, weight_dim, mask_dim, bias_dim, _ = in_dims
    if weight_dim is not None or mask_dim is not None or x_dim is None:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    shared_bias = bias if bias_dim is None else None
    y = call(_fold(x, x_dim), weight, mask, shared_bias, dense_weight_grad)
    y = y.unflatten(0, (info.batch_size, -1))
    return (y if bias_dim is None else y + bias.movedim(bias_dim, 0)[:, None]), 0


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    need_x: bool,
    need_weight: bool,
    dense_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(x.shape if need_x else (0,)),
        grad.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, weight, mask, ctx.need_x, ctx.need_weight, ctx.dense_weight_grad = inputs
    ctx.save_for_backward(grad, x, weight, mask)


def _double_backward(
    ctx: Any, tangent_x: Tensor | None, tangent_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Derivative of (dX, dW) = (G (W o M), (G^T X) o M); with a dense dW its mask is absent."""
    grad, x, weight, mask = ctx.saved_tensors
    dense = ctx.dense_weight_grad
    need_grad, need_x, need_weight = ctx.needs_input_grad[:3]
    through_x = ctx.need_x and tangent_x is not None
    through_weight = ctx.need_weight and tangent_weight is not None
    terms: list[Tensor] = []
    grad_x = grad_weight = None
    if through_x and need_grad:
        terms.append(masked_matmul(tangent_x, weight, mask, None, dense))
    if through_weight and tangent_weight is not None:
        tangent = tangent_weight if dense else torch.where(mask, tangent_weight, 0.0)
        if need_grad:
            terms.append(x @ tangent.mT)
        if need_x:
            grad_x = grad @ tangent
    if through_x and need_weight:
        grad_weight = masked_matmul_backward(grad, tangent_x, weight, mask, False, True, dense)[1]
    return (sum(terms[1:], terms[0]) if terms else None, grad_x, grad_weight, *[None] * 4)


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    grad, x, weight, mask, need_x, need_weight, dense_weight_grad = args
    if in_dims[2] is not None or in_dims[3] is not None or None in in_dims[:2]:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    size = info.batch_size
    grad_x = grad_weight = grad.new_empty(size, 0)
    if need_x:
        folded = _fold(grad, in_dims[0])
        grad_x = call(folded, _fold(x, in_dims[1]), weight, mask, True, False, dense_weight_grad)[0]
        grad_x = grad_x.unflatten(0, (size, -1))
    if need_weight:  # per-sample weight gradients
        grad_weight = grad.movedim(in_dims[0], 0).mT @ x.movedim(in_dims[1], 0)
        if not dense_weight_grad:
            grad_weight = torch.where(mask, grad_weight, 0.0)
    return (grad_x, grad_weight), (0, 0)


masked_matmul_backward = define_op(
    OpSpec(
        "masked_matmul_backward",
        FAMILY,
        fake=_fake_backward,
        reference=reference.masked_matmul_backward,
        vmap=_vmap_backward,
        setup=_setup_backward,
        backward=_double_backward,
    )
)
masked_matmul = define_op(
    OpSpec(
        "masked_matmul",
        FAMILY,
        fake=_fake_masked_matmul,
        reference=reference.masked_matmul,
        vmap=_vmap_masked_matmul,
        setup=_setup_masked_matmul,
        backward=_backward_masked_matmul,
    )
)
