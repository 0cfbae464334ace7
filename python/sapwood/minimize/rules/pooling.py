"""Pooling, resampling and reductions over positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._facts import BY_POSITION, BY_SIZE, CONSTANT, LIVE, Facts, compress, varying
from sapwood.minimize.rules._registry import Step, opaque, rule

_MAX_POOLS = [
    f"aten.{name}{n}d{suffix}.default"
    for name in ("max_pool", "max_pool")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
]


@rule(*sorted(set(_MAX_POOLS)))
def max_pool(step: Step) -> Any:
    """Padding is minus infinity, so that constants stay."""
    x = step.analysis.labelled(step.facts()[0])
    return _pooled(step, x, x.kind)


@rule("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def average_pool(step: Step) -> Any:
    """Zeros of the padding are averaged too unless they are not counted."""
    bound, x = step.bound(), step.analysis.labelled(step.facts()[0])
    padded = any(bound["padding"]) and bound["count_include_pad"]
    kind = x.kind
    if padded or bound["ceil_mode"] or bound.get("divisor_override") is not None:
        constant = (kind == CONSTANT) & ~x.zero()
        kind = torch.where(constant, BY_POSITION, kind).to(torch.uint8)
    return _pooled(step, x, kind)


@rule(
    "aten.adaptive_avg_pool1d.default",
    "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_avg_pool3d.default",
    "aten.adaptive_max_pool1d.default",
    "aten.adaptive_max_pool2d.default",
    "aten.adaptive_max_pool3d.default",
    "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default",
)
def adaptive_pool(step: Step) -> Any:
    """What varies over positions becomes a number that depends on the size of the input."""
    x = step.analysis.labelled(step.facts()[0])
    return _pooled(step, x, torch.where(x.kind == BY_POSITION, BY_SIZE, x.kind).to(torch.uint8))


@rule(
    "aten.upsample_nearest1d.vec",
    "aten.upsample_nearest2d.vec",
    "aten.upsample_nearest3d.vec",
    "aten.upsample_nearest1d.default",
    "aten.upsample_nearest2d.default",
    "aten.upsample_nearest3d.default",
    "aten._upsample_nearest_exact2d.vec",
    "aten._upsample_nearest_exact2d.default",
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_bilinear2d.default",
    "aten._upsample_bilinear2d_aa.vec",
    "aten._upsample_bilinear2d_aa.default",
    "aten.upsample_linear1d.vec",
    "aten.upsample_linear1d.default",
    "aten.upsample_trilinear3d.vec",
    "aten.upsample_trilinear3d.default",
)
def resample(step: Step) -> Any:
    """The weights of every position add up to one, so that constants stay."""
    x = step.analysis.labelled(step.facts()[0])
    return _pooled(step, x, torch.where(x.kind == BY_POSITION, BY_SIZE, x.kind).to(torch.uint8))


def _pooled(step: Step, x: Facts, kind: Tensor) -> Any:
    """The kind of a channel is the worst of its positions."""
    values = list(step.value) if isinstance(step.value, (tuple, list)) else [step.value]
    dims = list(range(2, x.ndim))
    if x.ndim < 3 or any(set(varying(field)) & set(dims) for field in x.fields):
        return opaque(step, f"{step.place} pools over channels")
    reduced = kind.amax(dims, keepdim=True) if dims else kind
    facts = [Facts(value, compress(reduced), x.fields) for value in values]
    return facts if isinstance(step.value, (tuple, list)) else facts[0]


@rule(
    "aten.mean.dim",
    "aten.mean.default",
    "aten.sum.dim_IntList",
    "aten.sum.default",
    "aten.amax.default",
    "aten.amin.default",
    "aten.var.dim",
    "aten.var.correction",
    "aten.std.dim",
    "aten.std.correction",
    "aten.logsumexp.default",
    "aten.linalg_vector_norm.default",
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.log_softmax.int",
    "aten.cumsum.default",
    "aten.argmax.default",
)
def reduction(step: Step) -> Any:
    """A channel that is reduced over must stay; reducing positions leaves channels alone."""
    bound, x = step.bound(), step.analysis.labelled(step.facts()[0])
    dims = reduced_axes(bound, x.ndim)
    kept: list[Tensor] = []
    for field in x.fields:
        if set(varying(field)) & set(dims):
            step.analysis.atoms.pin(field, f"{step.place} reduces over channels")
        else:
            kept.append(field)
    kind = x.kind.amax(dims, keepdim=True)
    safe = (CONSTANT,) if step.name in ("mean", "amax", "amin") else ()
    sized = torch.where(kind == LIVE, LIVE, BY_SIZE)
    kind = torch.where(kind == CONSTANT, CONSTANT, sized) if safe else sized
    kind = kind.to(torch.uint8)
    if step.value.dim() < x.ndim:
        for axis in sorted(dims, reverse=True):
            kind = kind.squeeze(axis)
            kept = [field.squeeze(axis) for field in kept]
    return Facts(step.value, compress(kind), tuple(kept))


def reduced_axes(bound: dict[str, Any], ndim: int) -> list[int]:
    """The axes that a reduction goes over."""
    dim = bound.get("dim")
    if dim is None or dim == []:
        return list(range(ndim))
    return sorted({d % ndim for d in ([dim] if isinstance(dim, int) else dim)})
