"""Declarations of the ops over circuits: x (m, B, k), grad (B, R)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.ops.logsemiring._specs import FAMILY, through
from sapwood.reference import logsemiring as reference

_RESULTS = 1  # which of the counts


def _fake(x: Tensor, evidence: Tensor | None, circuit: Tensor, counts: list[int]) -> Tensor:
    return x.new_empty(x.shape[1], counts[_RESULTS])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.counts = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return log_circuit_backward(grad, *ctx.saved_tensors, ctx.counts), None, None, None


def _fake_backward(
    grad: Tensor, x: Tensor, evidence: Tensor | None, circuit: Tensor, counts: list[int]
) -> Tensor:
    return x.new_empty(x.shape)


def _backward_backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, evidence, circuit = ctx.saved_tensors

    def first(grad: Tensor, x: Tensor) -> tuple[Tensor]:
        return (reference.log_circuit_backward(grad, x, evidence, circuit, ctx.counts),)

    return *through(first, (grad, x), (tangent,)), None, None, None


def _rows(value: Tensor, dim: int | None, size: int, rows: int) -> Tensor:
    """Merges a vmapped dimension with that of the rows; what is not vmapped is repeated."""
    if dim is None:
        return value.unsqueeze(rows).expand(*value.shape[:rows], size, *value.shape[rows:])
    return value.movedim(dim, rows)


def _vmap(call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """One call with all rows of the batch; ``args`` are (grad,) x, evidence, circuit, counts."""
    size = info.batch_size
    *leading, x, evidence, circuit, counts = args
    *leading_dims, x_dim, evidence_dim, circuit_dim, _ = in_dims
    if circuit_dim is not None or size == 0:
        return loop_over_batch(call, info, in_dims, *args)
    folded = [
        _rows(g, d, size, 0).flatten(0, 1) for g, d in zip(leading, leading_dims, strict=True)
    ]
    seen = None if evidence is None else _rows(evidence, evidence_dim, size, 0).flatten(0, 1)
    wide = _rows(x, x_dim, size, 1).flatten(1, 2)
    result = call(*folded, wide, seen, circuit, counts)
    at = 1 if leading else 0  # the gradient has the rows in the middle, as x
    return result.unflatten(at, (size, -1) if result.shape[at] else (size, 0)), at


log_circuit_backward = define_op(
    OpSpec(
        "log_circuit_backward",
        FAMILY,
        fake=_fake_backward,
        reference=reference.log_circuit_backward,
        vmap=_vmap,
        setup=_setup,
        backward=_backward_backward,
    )
)
log_circuit = define_op(
    OpSpec(
        "log_circuit",
        FAMILY,
        fake=_fake,
        reference=reference.log_circuit,
        vmap=_vmap,
        setup=_setup,
        backward=_backward,
    )
)
