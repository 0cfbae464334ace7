"""Declarations of the ops over segments and sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.ops.logsemiring._specs import (
    FAMILY,
    _fold,
    _unfold,
    _vmap_batched,
    _vmap_sample,
    through,
)
from sapwood.reference import logsemiring as reference

# segments: x (O, n, I), ptr (S + 1,), order (n,) or None ------------------------------------------


def _sums(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sums over segments, (O, n, I) -> (O, S, I): torch is fast at index_add of vectors only."""
    outer, _, inner = x.shape
    at = ids
    if outer != 1 or inner != 1:
        blocks = torch.arange(outer, device=ids.device)[:, None, None] * count + ids[:, None]
        at = (blocks * inner + torch.arange(inner, device=ids.device)).flatten()
    total = x.new_zeros(outer * count * inner).index_add(0, at, x.flatten())
    return total.view(outer, count, inner)


def _fake_values(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], ptr.shape[0] - 1, x.shape[2])


def _fake_weights(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _setup_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_values(
    ctx: Any, grad: Tensor, op: Callable[..., Any] | None = None
) -> tuple[Tensor, None, None]:
    """By ``op``, or by the op of the schema."""
    return (op or segment_logsumexp_backward)(grad, *ctx.saved_tensors), None, None


def _fake_shares(grad: Tensor, x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shares(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad, x, ptr, order = ctx.saved_tensors
    return (*segment_logsumexp_double_backward(grad, x, tangent, ptr, order), None, None)


def _fake_second(
    grad: Tensor, x: Tensor, tangent: Tensor, ptr: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), x.new_empty(x.shape)


def _backward_second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, ptr, order = ctx.saved_tensors

    def second(grad: Tensor, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        # The reference's formula; its own softmax reads ptr, which a compiler cannot follow.
        ids = reference.segment_ids(ptr, order, x.shape[1])
        p = segment_softmax(x, ptr, order)
        mean = _sums(p * tangent, ids, ptr.shape[0] - 1)
        centred = tangent - mean.index_select(1, ids)
        return mean, grad.index_select(1, ids) * p * centred

    return *through(second, ctx.saved_tensors[:3], grads), None, None


def _setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[1:])


def _backward_weights(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """p (g - sum of p g over the segment)."""
    p, ptr, order = ctx.saved_tensors
    ids = reference.segment_ids(ptr, order, p.shape[1])
    mean = _sums(p * grad, ids, ptr.shape[0] - 1)
    return p * (grad - mean.index_select(1, ids)), None, None


def _vmap_shares(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    if in_dims[2] is not None or in_dims[3] is not None or info.batch_size == 0:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    grad, x = (_fold(a, d, info.batch_size) for a, d in zip(args[:2], in_dims[:2], strict=True))
    return _unfold(call(grad, x, *args[2:]), info.batch_size), 0


def _vmap_second(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    size = info.batch_size
    if in_dims[3] is not None or in_dims[4] is not None or size == 0:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    folded = (_fold(a, d, size) for a, d in zip(args[:3], in_dims[:3], strict=True))
    return tuple(_unfold(r, size) for r in call(*folded, *args[3:])), (0, 0)


def _vmap_segments(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    if in_dims[1] is not None or in_dims[2] is not None or info.batch_size == 0:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    x, ptr, order = args
    return _unfold(call(_fold(x, in_dims[0], info.batch_size), ptr, order), info.batch_size), 0


segment_softmax = define_op(
    OpSpec(
        "segment_softmax",
        FAMILY,
        fake=_fake_weights,
        reference=reference.segment_softmax,
        vmap=_vmap_segments,
        setup=_setup_weights,
        backward=_backward_weights,
    )
)
segment_logsumexp_double_backward = define_op(
    OpSpec(
        "segment_logsumexp_double_backward",
        FAMILY,
        fake=_fake_second,
        reference=reference.segment_logsumexp_double_backward,
        vmap=_vmap_second,
        setup=_setup_values,
        backward=_backward_second,
    )
)
segment_logsumexp_backward = define_op(
    OpSpec(
        "segment_logsumexp_backward",
        FAMILY,
        fake=_fake_shares,
        reference=reference.segment_logsumexp_backward,
        vmap=_vmap_shares,
        setup=_setup_values,
        backward=_backward_shares,
    )
)
segment_logsumexp = define_op(
    OpSpec(
        "segment_logsumexp",
        FAMILY,
        fake=_fake_values,
        reference=reference.segment_logsumexp,
        vmap=_vmap_segments,
        setup=_setup_values,
        backward=backward_values,
    )
)

# segment_max -------------------------------------------------------------------------------------


def _fake_maxima(x: Tensor, ptr: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    values = x.new_empty(x.shape[0], ptr.shape[0] - 1, x.shape[2])
    return values, values.new_empty(values.shape, dtype=torch.long)


def _setup_maxima(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.entries = inputs[0].shape[1]


def _backward_maxima(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    """The gradient of a segment goes to the entry that attains its maximum."""
    (index,) = ctx.saved_tensors
    dx = grad.new_zeros(grad.shape[0], ctx.entries, grad.shape[2])
    if ctx.entries > 0:
        kept = torch.where(index < 0, 0.0, grad)
        dx = dx.scatter_add(1, index.clamp_min(0), kept)
    return dx, None, None


def _vmap_maxima(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    size = info.batch_size
    if in_dims[1] is not None or in_dims[2] is not None or size == 0:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    x, ptr, order = args
    found = call(_fold(x, in_dims[0], size), ptr, order)
    return tuple(_unfold(r, size) for r in found), (0, 0)


segment_max = define_op(
    OpSpec(
        "segment_max",
        FAMILY,
        fake=_fake_maxima,
        reference=reference.segment_max,
        vmap=_vmap_maxima,
        setup=_setup_maxima,
        backward=_backward_maxima,
    )
)

# log_scan: t (B, L, k, k), init (B, R, k), states (B, L + 1, R, k) --------------------------------


def _fake_scan(t: Tensor, init: Tensor, maximum: bool) -> Tensor:
    shape = (t.shape[0], t.shape[1] + 1, init.shape[1], t.shape[2])
    return t.new_empty(shape, dtype=torch.float64)


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.maximum = inputs[2]


def backward_scan(
    ctx: Any, grad: Tensor, op: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor, None]:
    """By ``op``, or by the op of the schema."""
    t, states = ctx.saved_tensors
    dt, dinit = (op or log_scan_backward)(grad, t, states, ctx.maximum)
    return dt, dinit, None


def _fake_scan_backward(
    grad: Tensor, t: Tensor, states: Tensor, maximum: bool
) -> tuple[Tensor, Tensor]:
    rows, k = states.shape[2:]
    return t.new_empty(t.shape), t.new_empty(t.shape[0], rows, k)


def _setup_scan_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.maximum = inputs
    ctx.save_for_backward(*tensors)


def _backward_scan_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def first(grad: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_scan_backward(grad, t, states, ctx.maximum)

    return *through(first, ctx.saved_tensors, grads), None


def _fake_path(
    t: Tensor, states: Tensor, final: Tensor, num_samples: int, seed: int, maximum: bool
) -> Tensor:
    return t.new_empty(num_samples, t.shape[0], t.shape[1] + 1, dtype=torch.long)


log_scan_backward = define_op(
    OpSpec(
        "log_scan_backward",
        FAMILY,
        fake=_fake_scan_backward,
        reference=reference.log_scan_backward,
        vmap=_vmap_batched,
        setup=_setup_scan_backward,
        backward=_backward_scan_backward,
    )
)
log_scan = define_op(
    OpSpec(
        "log_scan",
        FAMILY,
        fake=_fake_scan,
        reference=reference.log_scan,
        vmap=_vmap_batched,
        setup=_setup_scan,
        backward=backward_scan,
    )
)
log_scan_path = define_op(
    OpSpec(
        "log_scan_path",
        FAMILY,
        fake=_fake_path,
        reference=reference.log_scan_path,
        vmap=_vmap_sample,
    )
)
