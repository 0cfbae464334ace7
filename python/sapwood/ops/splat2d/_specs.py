"""Declarations of the family's ops: fakes, derivatives and vmap rules.

mu (B, N, 2), chol (B, N, 3), feat (B, N, C), counts (B,) or None, image (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import splat2d as reference

FAMILY = "splat2d"


def _fold(value: Any, dim: int | None, size: int) -> Any:
    """Merges a vmapped dimension with the batch in front; what is not vmapped is repeated."""
    if not isinstance(value, Tensor):
        return value
    moved = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    folded: Tensor = moved.flatten(0, 1)
    return folded


def _vmap_batched(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """All tensors have the batch in front: one call for the whole batch of batches."""
    size = info.batch_size
    if size == 0:
        return loop_over_batch(call, info, in_dims, *args)
    result = call(*(_fold(a, d, size) for a, d in zip(args, in_dims, strict=True)))
    if not isinstance(result, tuple):
        return result.unflatten(0, (size, -1)) if len(result) else _empty(result, size), 0
    parts = tuple(r.unflatten(0, (size, -1)) if len(r) else _empty(r, size) for r in result)
    return parts, (0,) * len(parts)


def _empty(result: Tensor, size: int) -> Tensor:
    """A batch of no items, ``size`` times."""
    return result.expand(size, *result.shape)


# splat2d ------------------------------------------------------------------------------------------


def _fake_splat2d(
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    height: int,
    width: int,
    cutoff: float,
) -> Tensor:
    return mu.new_empty(mu.shape[0], feat.shape[2], height, width)


def _setup_splat2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mu, chol, feat, counts, _, _, ctx.cutoff = inputs
    ctx.save_for_backward(mu, chol, feat, counts)


def backward_by(gradients: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative of an image by an op with the signature of ``splat2d_backward``."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if not any(needed):
            return (None,) * 7
        found = gradients(grad, *ctx.saved_tensors, ctx.cutoff, False)[:3]
        kept = (g if need else None for g, need in zip(found, needed, strict=True))
        return (*kept, *(None,) * 4)

    return backward


def _fake_backward(
    grad: Tensor,
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    cutoff: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = mu.new_empty(mu.shape[0], mu.shape[1] if with_stats else 0, 2)
    return mu.new_empty(mu.shape), mu.new_empty(chol.shape), mu.new_empty(feat.shape), stats


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, mu, chol, feat, counts, ctx.cutoff, ctx.with_stats = inputs
    ctx.save_for_backward(grad, mu, chol, feat, counts)


def _backward_backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of the reference, in chunks of Gaussians: correct, not fast."""
    grad, mu, chol, feat, counts = ctx.saved_tensors

    def first(g: Tensor, m: Tensor, c: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        return reference.splat2d_backward(g, m, c, f, counts, ctx.cutoff, ctx.with_stats)

    pair: Any = torch.func.vjp(first, grad, mu, chol, feat)
    outputs, vjp = pair
    given = tuple(
        torch.zeros_like(o) if t is None else t for o, t in zip(outputs, tangents, strict=True)
    )
    return (*vjp(given), None, None, None)


splat2d_backward = define_op(
    OpSpec(
        "splat2d_backward",
        FAMILY,
        fake=_fake_backward,
        reference=reference.splat2d_backward,
        vmap=_vmap_batched,
        setup=_setup_backward,
        backward=_backward_backward,
    )
)
splat2d = define_op(
    OpSpec(
        "splat2d",
        FAMILY,
        fake=_fake_splat2d,
        reference=reference.splat2d,
        vmap=_vmap_batched,
        setup=_setup_splat2d,
        backward=backward_by(splat2d_backward),
    )
)

# splat2d_pairs ------------------------------------------------------------------------------------


def _fake_pairs(
    mu: Tensor, chol: Tensor, counts: Tensor | None, height: int, width: int, cutoff: float
) -> Tensor:
    return mu.new_empty(mu.shape[0], dtype=torch.int64)


splat2d_pairs = define_op(
    OpSpec(
        "splat2d_pairs",
        FAMILY,
        fake=_fake_pairs,
        reference=reference.splat2d_pairs,
        vmap=_vmap_batched,
    )
)
