"""BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize._facts import (
    BY_POSITION,
    BY_SIZE,
    CONSTANT,
    LIVE,
    Facts,
    compress,
    reduce_to_axis,
)
from sapwood.minimize._leaves import Site
from sapwood.minimize._tails import FEATURE, Tail
from sapwood.minimize.layers import Normalization
from sapwood.minimize.modules import CompensatedGroupNorm, CompensatedLayerNorm, CompensatedRMSNorm
from sapwood.minimize.rules._registry import Step, opaque, rule
from sapwood.minimize.rules.linear import channel_view, owner_of

__all__ = ["compensated"]


@rule("aten._native_batch_norm_legit_no_training.default")
def batch_norm(step: Step) -> Any:
    """Affine per channel on axis 1; a gain of 0 makes a channel its bias."""
    bound = step.bound()
    x = step.analysis.labelled(bound["input"])
    parameters = [bound[key] for key in ("weight", "bias", "running_mean", "running_var")]
    present = [p for p in parameters if p is not None]
    for facts in present:
        trouble = step.analysis.trouble(facts, "a parameter")
        if trouble:
            return opaque(step, f"{step.place}: {trouble}")
    view = channel_view(step, x, 1)
    kind = x.kind
    gain = bound["weight"]
    shape = [1, -1] + [1] * (x.ndim - 2)
    if gain is not None:
        kind = torch.where((gain.value == 0).reshape(shape), CONSTANT, kind).to(torch.uint8)
    fields = view.rest
    if view.atoms is not None:
        for facts in present:
            step.analysis.slot(facts.source, 0, view.atoms)
        fields = (*fields, view.atoms.reshape(shape))
    output = Facts(step.value[0], compress(kind), fields)
    return [output, *step.value[1:]]


@rule(
    "aten.batch_norm.default",
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit.default",
    "aten.native_batch_norm.default",
    "aten._native_batch_norm_legit.no_stats",
)
def batch_statistics(step: Step) -> Any:
    """In training mode every channel depends on the batch."""
    return opaque(step, f"{step.place} uses the statistics of the batch")


@rule("aten.instance_norm.default")
def instance_norm(step: Step) -> Any:
    """A constant channel becomes its bias."""
    bound = step.bound()
    x = step.analysis.labelled(bound["input"])
    if not bound["use_input_stats"]:
        return opaque(step, f"{step.place} uses running statistics")
    present = [bound[key] for key in ("weight", "bias") if bound[key] is not None]
    for facts in present:
        trouble = step.analysis.trouble(facts, "a parameter")
        if trouble:
            return opaque(step, f"{step.place}: {trouble}")
    view = channel_view(step, x, 1)
    shape = [1, -1] + [1] * (x.ndim - 2)
    kinds = torch.where(view.kinds == BY_POSITION, BY_SIZE, view.kinds)
    if bound["weight"] is not None:
        kinds = torch.where(bound["weight"].value == 0, CONSTANT, kinds)
    fields: tuple[Tensor, ...] = ()
    for field in view.rest:
        step.analysis.atoms.pin(field, f"{step.place} normalises over channels")
    if view.atoms is not None:
        for facts in present:
            step.analysis.slot(facts.source, 0, view.atoms)
        fields = (view.atoms.reshape(shape),)
    return Facts(step.value, compress(kinds.to(torch.uint8).reshape(shape)), fields)


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def joint_norm(step: Step) -> Any:
    """A channel may go where its input is constant; the norm is then compensated."""
    bound = step.bound()
    x, gain = step.analysis.labelled(bound["input"]), bound["weight"]
    path = owner_of(gain.source) if gain is not None and gain.source else step.path
    module = step.analysis.module(path)
    wanted = nn.LayerNorm if step.name == "layer_norm" else nn.RMSNorm
    shift = bound.get("bias")
    reason = _uncut(step, module, wanted, len(bound["normalized_shape"]), (gain, shift))
    if reason:
        return _untouched(step, x, reason)
    return _normalised(step, path, x, gain, wanted is nn.LayerNorm)


def _uncut(
    step: Step,
    module: nn.Module | None,
    wanted: type[nn.Module],
    axes: int,
    parameters: tuple[Facts | None, ...],
) -> str | None:
    for facts in parameters:
        trouble = step.analysis.trouble(facts, "a parameter")
        if trouble:
            return f"{step.place}: {trouble}"
    if type(module) is not wanted:
        return f"{step.place} is called outside of a plain {wanted.__name__}"
    if axes != 1:
        return f"{step.place} normalises {axes} axes"
    return None


def _untouched(step: Step, x: Facts, reason: str) -> Facts:
    """The norm stays whole, and so do its channels; other axes keep theirs."""
    view = channel_view(step, x, -1)
    if view.atoms is not None:
        step.analysis.atoms.pin(view.atoms, reason)
    return Facts(step.value, _joint_kind(x), view.rest)


def _joint_kind(x: Facts) -> Tensor:
    """(..., 1): live where any channel is."""
    kind = x.kind.amax(-1, keepdim=True)
    return compress(kind)


def _normalised(
    step: Step, path: str, x: Facts, gain: Facts | None, layer_norm: bool, features: int = 0
) -> Facts:
    """The facts behind a norm that appends ``features`` already."""
    view = channel_view(step, x, -1)
    kind = _joint_kind(x)
    if gain is not None:
        shape = [1] * (x.ndim - 1) + [-1]
        zero = (gain.value == 0).reshape(shape)
        kind = torch.where(zero, CONSTANT, kind.expand(*kind.shape[:-1], zero.shape[-1]))
    fields, tail = view.rest, None
    if view.atoms is not None:
        mask = view.uniform & (reduce_to_axis(kind, -1, x.shape[-1]) == LIVE)
        count = 2 if layer_norm else 1
        tail = Tail(path, mask, view.constants, count, features > 0, view.atoms)
        step.analysis.tails.append(tail)
        layer = Normalization(path, view.atoms, view.uniform, view.constants, tail=tail)
        step.analysis.layers.append(layer)
        written = view.atoms
        if features:
            more = step.analysis.atoms.new(features, path)
            step.analysis.atoms.pin(more, FEATURE)
            written = torch.cat((written, more))
            live = torch.full((*kind.shape[:-1], features), LIVE, dtype=torch.uint8)
            kind = torch.cat((kind.expand(*kind.shape[:-1], x.shape[-1]), live), -1)
        fields = (*fields, written.reshape([1] * (x.ndim - 1) + [-1]))
    return Facts(step.value, compress(kind.to(torch.uint8)), fields, tail)


def compensated(step: Step, site: Site, x: Facts) -> Any:
    """A LayerNorm or RMSNorm that lost channels in an earlier pass."""
    module = site.module
    assert isinstance(module, (CompensatedLayerNorm, CompensatedRMSNorm))
    if module.tail == "mean" or getattr(module, "channels_first", False):
        return opaque(step, f"{site.path} is of a form that minimization does not make")

    def leaf(value: Tensor | None) -> Facts | None:
        if value is None:
            return None
        return Facts(value.detach(), torch.zeros([1] * value.dim(), dtype=torch.uint8))

    layer_norm = isinstance(module, CompensatedLayerNorm)
    features = step.value.shape[-1] - x.shape[-1]
    return _normalised(step, site.path, x, leaf(module.weight), layer_norm, features)


@rule("aten.group_norm.default")
def group_norm(step: Step) -> Any:
    """The compensated form per group, with equal numbers of channels."""
    bound = step.bound()
    x, gain, shift = step.analysis.labelled(bound["input"]), bound["weight"], bound["bias"]
    path = owner_of(gain.source) if gain is not None and gain.source else step.path
    module = step.analysis.module(path)
    reason = _uncut(step, module, nn.GroupNorm, 1, (gain, shift))
    if reason:
        return opaque(step, reason)
    return _grouped(step, path, bound["num_groups"], x, gain)


def compensated_groups(step: Step, site: Site, x: Facts) -> Any:
    """A GroupNorm that lost channels in an earlier pass."""
    module = site.module
    assert isinstance(module, CompensatedGroupNorm)
    gain = None
    if module.weight is not None:
        value = module.weight.detach()
        gain = Facts(value, torch.zeros([1] * value.dim(), dtype=torch.uint8))
    return _grouped(step, site.path, module.groups, x, gain)


def _grouped(step: Step, path: str, groups: int, x: Facts, gain: Facts | None) -> Facts:
    view = channel_view(step, x, 1)
    size = x.shape[1]
    joint = reduce_to_axis(x.kind, 1, size).reshape(groups, -1).amax(1)
    joint = torch.where(joint == BY_POSITION, BY_SIZE, joint)
    kinds = joint.repeat_interleave(size // groups)
    if gain is not None:
        kinds = torch.where(gain.value == 0, CONSTANT, kinds)
    for field in view.rest:
        step.analysis.atoms.pin(field, f"{step.place} normalises over channels")
    shape = [1, -1] + [1] * (x.ndim - 2)
    fields: tuple[Tensor, ...] = ()
    if view.atoms is not None:
        layer = Normalization(path, view.atoms, view.uniform, view.constants, groups)
        step.analysis.layers.append(layer)
        step.analysis.balances.append(layer.balance)
        fields = (view.atoms.reshape(shape),)
    return Facts(step.value, compress(kinds.to(torch.uint8).reshape(shape)), fields)
