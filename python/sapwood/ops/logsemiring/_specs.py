"""Declarations of the family's ops: fakes, derivatives and vmap rules. Products are batched:
a (B, M, K), b (B, K, N)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import logsemiring as reference

FAMILY = "logsemiring"


def _fold(value: Any, dim: int | None, size: int) -> Any:
    """Merges a vmapped dimension with the batch in front; what is not vmapped is repeated."""
    if not isinstance(value, Tensor):
        return value
    moved = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    folded: Tensor = moved.flatten(0, 1)
    return folded


def _unfold(result: Tensor, size: int, at: int = 0) -> Tensor:
    split: Tensor = result.unflatten(at, (size, result.shape[at] // size))
    return split


def _vmap_batched(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """All tensors have the batch in front: one call for the whole batch of batches."""
    size = info.batch_size
    if size == 0:
        return loop_over_batch(call, info, in_dims, *args)
    result = call(*(_fold(a, d, size) for a, d in zip(args, in_dims, strict=True)))
    if not isinstance(result, tuple):
        return _unfold(result, size), 0
    parts = tuple(_unfold(r, size) if r.dim() > 1 else r.expand(size, 0) for r in result)
    return parts, (0,) * len(parts)


# log_matmul ---------------------------------------------------------------------------------------


def _fake_log_matmul(a: Tensor, b: Tensor, exact: bool) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _setup_log_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.exact = inputs
    ctx.save_for_backward(a, b)


def backward_log_matmul(
    ctx: Any, grad: Tensor, op: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """By ``op``, or by the op of the schema."""
    a, b = ctx.saved_tensors
    need_a, need_b, _ = ctx.needs_input_grad
    if not (need_a or need_b):
        return None, None, None
    da, db = (op or log_matmul_backward)(grad, a, b, ctx.exact, need_a, need_b)
    return da if need_a else None, db if need_b else None, None


def _fake_first(
    grad: Tensor, a: Tensor, b: Tensor, exact: bool, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(a.shape if need_a else (0,)),
        grad.new_empty(b.shape if need_b else (0,)),
    )


def _setup_first(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, a, b, _, ctx.need_a, ctx.need_b = inputs
    ctx.save_for_backward(grad, a, b)


def _backward_first(
    ctx: Any, tangent_a: Tensor | None, tangent_b: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad, a, b = ctx.saved_tensors
    ta = tangent_a if ctx.need_a and tangent_a is not None else torch.zeros_like(a)
    tb = tangent_b if ctx.need_b and tangent_b is not None else torch.zeros_like(b)
    return (*log_matmul_double_backward(grad, a, b, ta, tb), None, None, None)


def _fake_second(
    grad: Tensor, a: Tensor, b: Tensor, tangent_a: Tensor, tangent_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def through(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """A backward pass by the derivative of the reference: where a kernel would hardly be used."""
    pair: Any = torch.func.vjp(function, *inputs)
    outputs, vjp = pair
    given = tuple(
        torch.zeros_like(o) if g is None else g.to(o.dtype)
        for o, g in zip(outputs, grads, strict=True)
    )
    result: tuple[Tensor, ...] = vjp(given)
    return result


def _backward_second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return through(reference.log_matmul_double_backward, ctx.saved_tensors, grads)


log_matmul_double_backward = define_op(
    OpSpec(
        "log_matmul_double_backward",
        FAMILY,
        fake=_fake_second,
        reference=reference.log_matmul_double_backward,
        vmap=_vmap_batched,
        setup=_setup_inputs,
        backward=_backward_second,
    )
)
log_matmul_backward = define_op(
    OpSpec(
        "log_matmul_backward",
        FAMILY,
        fake=_fake_first,
        reference=reference.log_matmul_backward,
        vmap=_vmap_batched,
        setup=_setup_first,
        backward=_backward_first,
    )
)
log_matmul = define_op(
    OpSpec(
        "log_matmul",
        FAMILY,
        fake=_fake_log_matmul,
        reference=reference.log_matmul,
        vmap=_vmap_batched,
        setup=_setup_log_matmul,
        backward=backward_log_matmul,
    )
)

# max_matmul, sample_matmul ------------------------------------------------------------------------


def _fake_max(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(shape), a.new_empty(shape, dtype=torch.long)


def _setup_max(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.terms = inputs[0].shape[2]


def _backward_max(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of an output goes to the two entries that attain it."""
    (index,) = ctx.saved_tensors
    batch, m, n = grad.shape
    kept, at = torch.where(index < 0, 0.0, grad), index.clamp_min(0)
    if ctx.terms == 0:
        return grad.new_zeros(batch, m, 0), grad.new_zeros(batch, 0, n)
    need_a, need_b = ctx.needs_input_grad
    da = grad.new_zeros(batch, m, ctx.terms).scatter_add(2, at, kept) if need_a else None
    db = grad.new_zeros(batch, ctx.terms, n).scatter_add(1, at, kept) if need_b else None
    return da, db


def _fake_sample(a: Tensor, b: Tensor, num_samples: int, seed: int) -> Tensor:
    shape = (num_samples, a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(shape, dtype=torch.long)


def _vmap_sample(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = [_fold(a, d, size) for a, d in zip(args, in_dims, strict=True)]
    return _unfold(call(*folded), size, 1), 1


max_matmul = define_op(
    OpSpec(
        "max_matmul",
        FAMILY,
        fake=_fake_max,
        reference=reference.max_matmul,
        vmap=_vmap_batched,
        setup=_setup_max,
        backward=_backward_max,
    )
)
sample_matmul = define_op(
    OpSpec(
        "sample_matmul",
        FAMILY,
        fake=_fake_sample,
        reference=reference.sample_matmul,
        vmap=_vmap_sample,
    )
)
