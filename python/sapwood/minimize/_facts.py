"""What the analysis knows of a traced tensor: its values, how constant they are, its channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._tails import Tail

__all__ = [
    "BY_POSITION",
    "BY_SIZE",
    "CONSTANT",
    "LIVE",
    "Bounds",
    "Facts",
    "align",
    "compress",
    "demote",
    "reduce_to_axis",
    "varying",
]

#: A lattice. A CONSTANT channel holds the same number at every sample and position, whatever the
#: size of the input; BY_POSITION is independent of the input but not of the position; BY_SIZE
#: depends on the size of the input too, so that no number can replace it.
CONSTANT, BY_POSITION, BY_SIZE, LIVE = range(4)

#: Two values of one constant, computed at different positions, differ by summation order at most.
_SAME = 1e-12


@dataclass(frozen=True)
class Bounds:
    """What a tensor cannot fall below or exceed, compressed as ``Facts.kind`` is."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Facts:
    """One traced tensor.

    ``kind`` (uint8) and the ``fields`` (int64 atoms) have the tensor's number of axes, with size 1
    along axes where they do not vary. Every field covers axes of its own.
    """

    value: Tensor
    kind: Tensor
    fields: tuple[Tensor, ...] = ()
    tail: Tail | None = None
    source: str | None = None  # the parameter or buffer that this is, unchanged
    bounds: Bounds | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.dim()

    def on_axis(self, axis: int) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The field along one axis, as a vector; fields mixed with other axes; the rest."""
        axis %= max(1, self.ndim)
        vector: Tensor | None = None
        mixed: list[Tensor] = []
        rest: list[Tensor] = []
        for field in self.fields:
            axes = varying(field)
            if axis not in axes:
                rest.append(field)
            elif axes == [axis]:
                vector = field.flatten()
            else:
                mixed.append(field)
        return vector, tuple(mixed), tuple(rest)

    def with_fields(self, *fields: Tensor) -> Facts:
        return replace(self, fields=fields)

    def zero(self) -> Tensor:
        """Where the tensor is known to be exactly 0, broadcastable to its shape."""
        return compress((self.kind == CONSTANT) & (self.value == 0))


def varying(t: Tensor) -> list[int]:
    """The axes along which a compressed tensor has more than one entry."""
    return [axis for axis, size in enumerate(t.shape) if size > 1]


def compress(t: Tensor) -> Tensor:
    """Narrows every axis along which ``t`` does not vary to size 1."""
    for axis, size in enumerate(t.shape):
        if size > 1 and bool((t == t.narrow(axis, 0, 1)).all()):
            t = t.narrow(axis, 0, 1)
    return t.clone()


def align(t: Tensor, ndim: int) -> Tensor:
    """Leading axes of size 1, as broadcasting adds them."""
    return t.reshape((1,) * (ndim - t.dim()) + tuple(t.shape))


def reduce_to_axis(t: Tensor, axis: int, size: int) -> Tensor:
    """(size,), the largest entry at each index of an axis."""
    axis %= t.dim()
    others = [a for a in range(t.dim()) if a != axis]
    return (t.amax(others) if others else t).expand(size)


def demote(facts: Facts) -> Facts:
    """Calls CONSTANT only what does not vary along axes without channels."""
    free = [a for a in range(facts.ndim) if all(f.shape[a] == 1 for f in facts.fields)]
    constant = facts.kind == CONSTANT
    if not free or not facts.value.is_floating_point() or not bool(constant.any()):
        return facts
    value, same = facts.value, constant.expand(facts.shape)
    for axis in free:
        if value.shape[axis] > 1:
            same = same & close(value, value.narrow(axis, 0, 1))
    varies = constant & ~same
    if not bool(varies.any()):
        return facts
    for axis in free:
        varies = varies.any(axis, keepdim=True)
    kind = torch.where(varies & constant, BY_POSITION, facts.kind).to(torch.uint8)
    return replace(facts, kind=compress(kind))


def close(a: Tensor, b: Tensor) -> Tensor:
    """Equal up to the rounding of one sum in float64."""
    return (a - b).abs() <= _SAME * torch.maximum(a.abs(), b.abs()).clamp(min=1.0)


def no_facts(value: Any, kind: int) -> Facts:
    """A tensor without channels, of one kind everywhere."""
    return Facts(value, torch.full((1,) * value.dim(), kind, dtype=torch.uint8))
