"""Convolutions: dense, grouped, depthwise and transposed, with every kind of padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize._facts import BY_POSITION, CONSTANT, Facts, compress
from sapwood.minimize._leaves import Site
from sapwood.minimize.layers import Affine, GroupedConvolution
from sapwood.minimize.modules import BorderBias2d
from sapwood.minimize.rules._registry import Step, opaque, rule
from sapwood.minimize.rules.linear import (
    ChannelView,
    channel_view,
    foldable_bias,
    owner_of,
    read_tail,
    row_kinds,
)

__all__ = ["border_convolution"]


@dataclass(frozen=True)
class _Convolution:
    """A convolution's arguments, whatever operation they came from."""

    x: Facts
    weight: Facts
    bias: Facts | None
    padding: tuple[tuple[int, int], ...]  # before and after, per axis
    dilation: tuple[int, ...]
    groups: int
    taps: Tensor | None = None  # (out, *kernel), of earlier folded constants

    @property
    def width(self) -> int:
        return self.x.shape[1]

    def leaving(self) -> Tensor:
        """(*kernel) bool: the taps that fall outside the image at some output position.

        The first output reads tap t at ``d t - p``, the last one, for a size that leaves no
        remainder, at ``d (k - 1 - t) - p`` from the end; both are outside iff below zero.
        """
        outside = torch.zeros(self.weight.shape[2:], dtype=torch.bool)
        for axis, (before, after) in enumerate(self.padding):
            size, step = self.weight.shape[2 + axis], self.dilation[axis]
            tap = torch.arange(size)
            line = (step * tap < before) | (step * (size - 1 - tap) < after)
            shape = [1] * outside.dim()
            shape[axis] = size
            outside = outside | line.reshape(shape)
        return outside


_NAMES = [f"aten.conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")]


@rule(*_NAMES)
def convolution(step: Step) -> Any:
    """As a linear layer over channels; constants lose what falls into zero padding."""
    bound = step.bound()
    x, weight = step.analysis.labelled(bound["input"]), bound["weight"]
    if x.ndim != weight.ndim:
        return opaque(step, f"{step.place} takes an input without a batch")
    spatial = weight.ndim - 2
    dilation = _tuple(bound["dilation"], spatial)
    conv = _Convolution(
        x,
        weight,
        bound["bias"],
        _padding(bound["padding"], weight, dilation),
        dilation,
        bound["groups"],
    )
    return _convolved(step, conv, owner_of(weight.source or ""))


def border_convolution(step: Step, site: Site, x: Facts) -> Any:
    """A convolution that lost constants in an earlier pass."""
    module = site.module
    assert isinstance(module, BorderBias2d)

    def leaf(name: str, value: Tensor | None) -> Facts | None:
        if value is None:
            return None
        kind = torch.zeros([1] * value.dim(), dtype=torch.uint8)
        return Facts(value.detach(), kind, source=f"{site.path}.{name}".lstrip("."))

    weight = leaf("weight", module.weight)
    assert weight is not None
    padding = _padding(module.padding, weight, module.dilation)
    conv = _Convolution(
        step.analysis.labelled(x),
        weight,
        leaf("bias", module.bias),
        padding,
        module.dilation,
        module.groups,
        module.taps.detach(),
    )
    return _convolved(step, conv, site.path)


def _convolved(step: Step, conv: _Convolution, path: str) -> Any:
    analysis = step.analysis
    trouble = analysis.trouble(conv.weight, "the weight") or analysis.trouble(conv.bias, "the bias")
    if trouble:
        return opaque(step, f"{step.place}: {trouble}")
    if conv.groups == 1:
        return _dense(step, conv, path)
    if conv.groups == conv.width == len(conv.weight.value):
        return _depthwise(step, conv, path)
    return _grouped(step, conv, path)


def _dense(step: Step, conv: _Convolution, path: str) -> Facts:
    view = channel_view(step, conv.x, 1)
    connected = (conv.weight.value != 0).flatten(2).any(2)
    foldable, border = _folds(step, conv, view, path)
    writes = step.analysis.atoms.new(len(connected), path) if len(connected) > 1 else None
    layer = Affine(
        path,
        str(conv.weight.source),
        None if conv.bias is None else conv.bias.source,
        view.atoms,
        writes,
        connected,
        foldable,
        view.constants,
        border=border,
        taps=None if conv.taps is None else f"{path}.taps".lstrip("."),
        axis=_channel_axis(step, conv, path),
        kernel=conv.weight.shape[2:].numel(),
    )
    step.analysis.layers.append(layer)
    if type(step.analysis.module(path)) is nn.Conv2d and not bool(conv.leaving().any()):
        read_tail(conv.x.tail, layer)
    return _output(step, conv, view, connected, writes)


def _channel_axis(step: Step, conv: _Convolution, path: str) -> int | None:
    """Where modules may be put around the layer: the axis of its channels, from the end."""
    plain = type(step.analysis.module(path)) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return 1 - conv.weight.ndim if plain and step.analysis.may_surround(step, path) else None


def _output(
    step: Step, conv: _Convolution, view: ChannelView, connected: Tensor, writes: Tensor | None
) -> Facts:
    kinds = row_kinds(connected, view.kinds)
    kinds = torch.where(_uneven(conv, view), kinds.clamp(min=BY_POSITION), kinds)
    shape = [1, -1] + [1] * (conv.weight.ndim - 2)
    fields = () if writes is None else (writes.reshape(shape),)
    for field in view.rest:
        step.analysis.atoms.pin(field, f"{step.place} slides over channels")
    return Facts(step.value, compress(kinds.to(torch.uint8).reshape(shape)), fields)


def _uneven(conv: _Convolution, view: ChannelView) -> Tensor:
    """(out,) bool: rows that the constants among the inputs shift differently at the border."""
    taps = _constant_taps(conv, view)
    if conv.taps is not None:
        taps = taps + conv.taps
    return (taps[:, conv.leaving()] != 0).any(1)


def _constant_taps(conv: _Convolution, view: ChannelView) -> Tensor:
    """(out, *kernel): what the constant inputs add at every tap."""
    per_group = conv.weight.shape[1]
    out = len(conv.weight.value) // conv.groups
    constants = view.constants.reshape(conv.groups, 1, per_group)
    weight = conv.weight.value.reshape(conv.groups, out, per_group, -1)
    taps = torch.einsum("goik,gui->gok", weight, constants)
    return taps.reshape(len(conv.weight.value), *conv.weight.shape[2:])


def _folds(
    step: Step, conv: _Convolution, view: ChannelView, path: str
) -> tuple[Tensor, str | None]:
    """Which constants can go, and whether through the border rather than the bias."""
    zero = view.constants == 0
    if not foldable_bias(step, conv.weight, conv.bias, path):
        return view.uniform & zero, None
    leaving = conv.leaving()
    safe = (conv.weight.value[:, :, leaving] == 0).all(2).all(0)
    if bool(safe.all()):
        return view.uniform, None
    border = step.analysis.options.border
    module = step.analysis.module(path)
    plain = type(module) in (nn.Conv2d, BorderBias2d) or conv.taps is not None
    if border == "refuse" or not plain or path == "":
        return view.uniform & (zero | safe), None
    return view.uniform, border


def _depthwise(step: Step, conv: _Convolution, path: str) -> Facts:
    view = channel_view(step, conv.x, 1)
    filtered = (conv.weight.value != 0).flatten(1).any(1)
    kinds = torch.where(filtered, view.kinds, CONSTANT)
    kinds = torch.where(_uneven(conv, view), kinds.clamp(min=BY_POSITION), kinds)
    shape = [1, -1] + [1] * (conv.weight.ndim - 2)
    fields: tuple[Tensor, ...] = ()
    if view.atoms is not None:
        for name in (conv.weight.source, None if conv.bias is None else conv.bias.source):
            if name is not None:
                step.analysis.slot(name, 0, view.atoms)
        if conv.taps is not None:
            step.analysis.slot(f"{path}.taps".lstrip("."), 0, view.atoms)
        fields = (view.atoms.reshape(shape),)
    for field in view.rest:
        step.analysis.atoms.pin(field, f"{step.place} slides over channels")
    return Facts(step.value, compress(kinds.to(torch.uint8).reshape(shape)), fields)


def _grouped(step: Step, conv: _Convolution, path: str) -> Any:
    view = channel_view(step, conv.x, 1)
    groups, out = conv.groups, len(conv.weight.value)
    local = (conv.weight.value != 0).flatten(2).any(2).reshape(groups, out // groups, -1)
    connected = torch.block_diag(*local)
    foldable, border = _folds_grouped(step, conv, view, path)
    if view.atoms is None:
        return opaque(step, f"{step.place} reads an axis without channels in groups")
    writes = step.analysis.atoms.new(out, path)
    layer = GroupedConvolution(
        path,
        str(conv.weight.source),
        None if conv.bias is None else conv.bias.source,
        view.atoms,
        writes,
        connected.bool(),
        foldable,
        view.constants,
        groups=groups,
        border=border,
        taps=None if conv.taps is None else f"{path}.taps".lstrip("."),
    )
    step.analysis.layers.append(layer)
    step.analysis.balances.append(layer.balance)
    return _output(step, conv, view, connected, writes)


def _folds_grouped(
    step: Step, conv: _Convolution, view: ChannelView, path: str
) -> tuple[Tensor, str | None]:
    """As for a dense convolution, without the ones channel, which would need one per group."""
    if not foldable_bias(step, conv.weight, conv.bias, path):
        return view.uniform & (view.constants == 0), None
    if not bool(conv.leaving().any()):
        return view.uniform, None
    plain = type(step.analysis.module(path)) is nn.Conv2d or conv.taps is not None
    if step.analysis.options.border != "table" or not plain or path == "":
        return view.uniform & (view.constants == 0), None
    return view.uniform, "table"


@rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed(step: Step) -> Any:
    """Only zeros fold: what a constant adds depends on the position, with period the stride."""
    bound = step.bound()
    x, weight, bias = step.analysis.labelled(bound["input"]), bound["weight"], bound["bias"]
    analysis = step.analysis
    trouble = analysis.trouble(weight, "the weight") or analysis.trouble(bias, "the bias")
    if trouble or bound["groups"] != 1 or x.ndim != weight.ndim:
        return opaque(step, f"{step.place}: {trouble or 'groups, or an input without a batch'}")
    view = channel_view(step, x, 1)
    path = owner_of(weight.source)
    connected = (weight.value != 0).flatten(2).any(2).T
    writes = analysis.atoms.new(len(connected), path) if len(connected) > 1 else None
    analysis.layers.append(
        Affine(
            path,
            weight.source,
            None if bias is None else bias.source,
            view.atoms,
            writes,
            connected,
            view.uniform & (view.constants == 0),
            view.constants,
            transposed=True,
        )
    )
    kinds = row_kinds(connected, view.kinds)
    shifted = ((view.constants != 0) & connected).any(1)
    kinds = torch.where(shifted, kinds.clamp(min=BY_POSITION), kinds)
    shape = [1, -1] + [1] * (weight.ndim - 2)
    fields = () if writes is None else (writes.reshape(shape),)
    for field in view.rest:
        analysis.atoms.pin(field, f"{step.place} slides over channels")
    return Facts(step.value, compress(kinds.to(torch.uint8).reshape(shape)), fields)


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def _padding(padding: Any, weight: Facts, dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    kernel = weight.shape[2:]
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _tuple(padding, len(kernel)))
