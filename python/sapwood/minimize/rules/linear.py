"""Linear layers and embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize._facts import (
    CONSTANT,
    LIVE,
    Facts,
    close,
    compress,
    reduce_to_axis,
)
from sapwood.minimize._tails import Tail
from sapwood.minimize.layers import Affine
from sapwood.minimize.rules._registry import Step, opaque, rule

__all__ = ["ChannelView", "channel_view", "foldable_bias", "read_tail", "row_kinds"]


@dataclass(frozen=True)
class ChannelView:
    """An argument seen along its channel axis: atoms, kinds and constants per channel."""

    atoms: Tensor | None  # (n,)
    kinds: Tensor  # (n,) uint8, the largest over positions
    constants: Tensor  # (n,) float64, meaningful where ``uniform``
    uniform: Tensor  # (n,) bool: a constant, equal at all positions
    rest: tuple[Tensor, ...]  # fields along other axes


def channel_view(step: Step, facts: Facts, axis: int) -> ChannelView:
    """Looks along one axis; channels that are spread over several axes are pinned."""
    axis %= facts.ndim
    size = facts.shape[axis]
    vector, mixed, rest = facts.on_axis(axis)
    for field in mixed:
        step.analysis.atoms.pin(field, f"{step.place} reads a part of an axis of channels")
    kinds = reduce_to_axis(facts.kind, axis, size)
    uniform = kinds == CONSTANT
    rows = facts.value.movedim(axis, 0).reshape(size, -1)
    constants = rows[:, 0].double() if rows.shape[1] else torch.zeros(size, dtype=torch.float64)
    if bool(uniform.any()):
        uniform = uniform & close(rows, rows[:, :1]).all(1)
    uniform = uniform & torch.isfinite(constants)
    constants = torch.where(uniform, constants, 0.0)
    return ChannelView(vector, kinds, constants, uniform, rest)


def row_kinds(connected: Tensor, kinds: Tensor) -> Tensor:
    """(..., out): the largest kind among the inputs that each output reads; CONSTANT for none."""
    weights = connected.float().T  # (in, out); a sum of ones is positive however it is rounded
    spread = kinds.expand(*kinds.shape[:-1], connected.shape[1])
    result = torch.zeros(*kinds.shape[:-1], connected.shape[0], dtype=torch.uint8)
    for level in range(CONSTANT + 1, LIVE + 1):
        read = ((spread == level).float() @ weights) > 0
        result = torch.where(read, level, result).to(torch.uint8)
    return result


def foldable_bias(step: Step, weight: Facts, bias: Facts | None, path: str) -> bool:
    """Whether constants can go into a bias: there is one, or the module can be given one."""
    if bias is not None:
        return True
    module = step.analysis.module(path)
    known = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return known and weight.source == f"{path}.weight".lstrip(".")


def owner_of(name: str) -> str:
    """The path of the module that holds a parameter."""
    return name.rpartition(".")[0]


def read_tail(tail: Tail | None, layer: Affine) -> None:
    """Lets a layer that is linear per token take the features of a norm."""
    if tail is not None and layer.reads is not None:
        layer.tail = tail
        tail.readers.append(layer)


@rule("aten.linear.default")
def linear(step: Step) -> Any:
    """Constants fold into the bias; a row that no reader uses goes, a row of zeros is its bias."""
    bound = step.bound()
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    analysis = step.analysis
    trouble = analysis.trouble(weight, "the weight") or analysis.trouble(bias, "the bias")
    if trouble or weight.ndim != 2:
        return opaque(step, f"{step.place}: {trouble or 'weight is no matrix'}")
    x = analysis.labelled(x)
    view = channel_view(step, x, -1)
    connected = weight.value != 0
    path = owner_of(weight.source)
    foldable = view.uniform
    if not foldable_bias(step, weight, bias, path):
        foldable = foldable & (view.constants == 0)
    out = weight.shape[0]
    writes = analysis.atoms.new(out, path) if out > 1 else None
    module = analysis.module(path)
    plain = isinstance(module, nn.Linear) and weight.source == f"{path}.weight".lstrip(".")
    layer = Affine(
        path,
        weight.source,
        bias.source if bias is not None else None,
        view.atoms,
        writes,
        connected,
        foldable,
        view.constants,
        axis=-1 if plain and analysis.may_surround(step, path) else None,
    )
    analysis.layers.append(layer)
    if plain:
        read_tail(x.tail, layer)
    kind = compress(row_kinds(connected, x.kind))
    fields = view.rest
    if writes is not None:
        fields = (*fields, writes.reshape([1] * (step.value.dim() - 1) + [out]))
    return Facts(step.value, kind, fields)


@rule("aten.embedding.default")
def embedding(step: Step) -> Any:
    """A column that is constant over the vocabulary is a constant channel."""
    weight = step.bound()["weight"]
    trouble = step.analysis.trouble(weight, "the table")
    if trouble:
        return opaque(step, f"{step.place}: {trouble}")
    width = weight.shape[1]
    if width == 1:
        return opaque(step)
    atoms = step.analysis.atoms.new(width, owner_of(weight.source))
    step.analysis.slot(weight.source, 1, atoms)
    same = (weight.value == weight.value[:1]).all(0)
    indices = step.bound()["indices"]
    kind = torch.where(same, CONSTANT, max(int(indices.kind.max()), 1)).to(torch.uint8)
    shape = [1] * (step.value.dim() - 1) + [width]
    return Facts(step.value, compress(kind.reshape(shape)), (atoms.reshape(shape),))
