"""Ranges of channels, from promises about the inputs: an activation that saturates is a constant.

Interval arithmetic (Moore, 1966) over channels. A layer's range is that of every position and of
every image size, which costs little tightness and makes it hold for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._facts import CONSTANT, Bounds, Facts, compress
from sapwood.minimize._leaves import LEAF_OPERATION, site_of
from sapwood.minimize.modules import InputSelect
from sapwood.minimize.rules._registry import Step, map_facts
from sapwood.minimize.rules.movement import MOVES, moved
from sapwood.minimize.rules.pooling import reduced_axes

__all__ = ["bounded"]

#: Constant outside of an interval, so that a range may leave a single value.
_SATURATING = "relu relu6 hardtanh hardsigmoid clamp clamp_min clamp_max"
_INCREASING = f"""
{_SATURATING} tanh sigmoid elu celu selu softplus leaky_relu alias clone detach contiguous dropout
feature_dropout alpha_dropout lift_fresh_copy
"""
_POOLS = """
max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
avg_pool1d avg_pool2d avg_pool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d
"""
#: Float64 sums are rounded; a range is widened by more than that.
_ROUNDING = 1e-12

#: From an operation and the ranges of its tensors, in their order, to that of its result.
_Range = Callable[[Step, list[Bounds | None]], Bounds | list[Bounds] | None]
_RANGES: dict[str, _Range] = {}


def _range(names: str) -> Callable[[_Range], _Range]:
    def register(function: _Range) -> _Range:
        for name in names.split():
            assert name not in _RANGES, name
            _RANGES[name] = function
        return function

    return register


def bounded(step: Step, result: Any) -> Any:
    """Gives the result of a rule its ranges, and calls constant what they leave one value."""
    if all(facts.bounds is None for facts in step.facts()):
        return map_facts(lambda facts: replace(facts, bounds=None), result)
    function = _RANGES.get(step.name if str(step.node.target) != LEAF_OPERATION else "leaf")
    operands = [_known(facts) for facts in step.facts()]
    found = function(step, operands) if function is not None else None
    ranges = iter(found if isinstance(found, list) else [found])
    result = map_facts(lambda facts: replace(facts, bounds=next(ranges, None)), result)
    if step.name in _SATURATING.split():
        result = map_facts(_settled, result)
    return result


def _known(facts: Facts) -> Bounds | None:
    """The range of a tensor; that of a constant is its value."""
    constant = facts.kind == CONSTANT
    if not facts.value.is_floating_point() or not facts.value.numel():
        return None
    if facts.bounds is None and not bool(constant.all()):
        return None
    free = [a for a, size in enumerate(facts.kind.shape) if size == 1]
    least, most = (
        getattr(facts.value, name)(free, keepdim=True) if free else facts.value
        for name in ("amin", "amax")
    )
    if facts.bounds is None:
        return Bounds(least, most)
    low = torch.where(constant, least, facts.bounds.low)
    return Bounds(compress(low), compress(torch.where(constant, most, facts.bounds.high)))


def _settled(facts: Facts) -> Facts:
    if facts.bounds is None:
        return facts
    single = facts.bounds.low == facts.bounds.high
    kind = torch.where(single, CONSTANT, facts.kind).to(torch.uint8)
    return replace(facts, kind=compress(kind))


@_range(_INCREASING)
def _increasing(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    x = operands[0]
    falling = step.name == "leaky_relu" and step.bound()["negative_slope"] < 0
    if x is None or falling or len(operands) > 1:  # limits that are tensors
        return None
    ends = [step.rerun(partial(_instead, end)) for end in (x.low, x.high)]
    return Bounds(*ends) if step.name in _SATURATING.split() else _widened(Bounds(*ends))


def _instead(end: Tensor, facts: Facts) -> Tensor:
    return end


def _chosen(ends: dict[int, Tensor], facts: Facts) -> Tensor:
    return ends[id(facts)]


def _widened(bounds: Bounds) -> Bounds:
    low, high = bounds.low, bounds.high
    return Bounds(
        torch.where(low.isinf(), low, low - _ROUNDING * low.abs()),
        torch.where(high.isinf(), high, high + _ROUNDING * high.abs()),
    )


@_range("add sub rsub mul div")
def _arithmetic(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    """The extremes of an operation that is monotone in each argument lie at its corners."""
    known = [bounds for bounds in operands if bounds is not None]
    if len(known) < len(operands):
        return None
    divisor = known[-1]
    if step.name == "div" and len(known) == 2 and bool((divisor.low * divisor.high <= 0).any()):
        return None
    corners = []
    for ends in itertools.product(*((bounds.low, bounds.high) for bounds in known)):
        at_corner = {id(facts): end for facts, end in zip(step.facts(), ends, strict=True)}
        corners.append(step.rerun(partial(_chosen, at_corner)))
    stacked = torch.stack(torch.broadcast_tensors(*corners))
    # Infinity less infinity, or times zero, may be anything.
    low = torch.where(stacked.isnan(), -torch.inf, stacked).amin(0)
    high = torch.where(stacked.isnan(), torch.inf, stacked).amax(0)
    return _widened(Bounds(compress(low), compress(high)))


def _fixed(*parameters: Facts | None) -> bool:
    return all(facts is None or bool((facts.kind == CONSTANT).all()) for facts in parameters)


@_range("linear")
def _linear(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    bound, x = step.bound(), operands[0]
    weight, bias = bound["weight"], bound["bias"]
    if x is None or not _fixed(weight, bias) or weight.ndim != 2:
        return None
    ends = _affine(x, weight.value, None if bias is None else bias.value)
    return Bounds(compress(ends.low), compress(ends.high))


@_range("conv1d conv2d conv3d")
def _convolution(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    """Every tap may meet every position, and the zeros of the padding where there are any."""
    bound, x, groups = step.bound(), operands[0], step.bound()["groups"]
    if x is None or not _fixed(bound["weight"], bound["bias"]):
        return None
    weight, padding = bound["weight"].value, bound["padding"]
    if x.low.dim() != weight.dim():
        return None
    padded = padding == "same" or (padding != "valid" and bool(torch.tensor(padding).any()))
    low, high = (
        end.expand(-1, weight.shape[1] * groups, *end.shape[2:]).movedim(1, -1).flatten(0, -2)
        for end in (x.low, x.high)
    )
    low, high = low.amin(0), high.amax(0)
    if padded:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # One row of weights per output, taps side by side.
    taps = weight[0, 0].numel()
    per_group = [end.reshape(groups, -1).repeat_interleave(taps, 1) for end in (low, high)]
    rows = weight.reshape(groups, -1, weight[0].numel())
    parts = [
        _affine(Bounds(least, most), w, None)
        for least, most, w in zip(*per_group, rows, strict=True)
    ]
    ends = [torch.cat([getattr(part, name) for part in parts]) for name in ("low", "high")]
    if bound["bias"] is not None:
        ends = [end + bound["bias"].value for end in ends]
    shape = [1, -1] + [1] * (weight.dim() - 2)
    return _widened(Bounds(*(compress(end.reshape(shape)) for end in ends)))


def _affine(x: Bounds, weight: Tensor, bias: Tensor | None) -> Bounds:
    """(..., in) -> (..., out): the largest sum takes the upper end where the weight is positive."""
    size = weight.shape[1]
    low, high = (end.expand(*end.shape[:-1], size) for end in (x.low, x.high))
    most = _largest(low, high, weight, bias)
    least = -_largest(low, high, -weight, None if bias is None else -bias)
    return Bounds(least, most)


def _largest(low: Tensor, high: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The largest sum; positive and negative terms apart, each rounded to the safe side."""
    up, down = weight.clamp(min=0.0).T, weight.clamp(max=0.0).T
    ends = [torch.where(end.isinf(), 0.0, end) for end in (low, high)]
    positive = ends[1].clamp(min=0.0) @ up + ends[0].clamp(max=0.0) @ down
    negative = ends[1].clamp(max=0.0) @ up + ends[0].clamp(min=0.0) @ down
    if bias is not None:
        positive, negative = positive + bias.clamp(min=0.0), negative + bias.clamp(max=0.0)
    total = positive * (1 + _ROUNDING) + negative * (1 - _ROUNDING)
    open_ended = (
        high.isinf().double() @ (up > 0).double() + low.isinf().double() @ (down < 0).double()
    )
    return torch.where(open_ended > 0, torch.inf, total)


@_range("_native_batch_norm_legit_no_training")
def _batch_norm(step: Step, operands: list[Bounds | None]) -> list[Bounds] | None:
    bound, x = step.bound(), operands[0]
    gain, shift, mean, variance = (
        bound[key] for key in ("weight", "bias", "running_mean", "running_var")
    )
    if x is None or not _fixed(gain, shift, mean, variance):
        return None
    scale = (variance.value + bound["eps"]).rsqrt()
    if gain is not None:
        scale = scale * gain.value
    offset = -mean.value * scale
    if shift is not None:
        offset = offset + shift.value
    shape = [1, -1] + [1] * (x.low.dim() - 2)
    scale, offset = scale.reshape(shape), offset.reshape(shape)
    ends = [torch.where(scale == 0, 0.0, end * scale) for end in (x.low, x.high)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    low, high = (_moved_by(end, offset, sign) for end, sign in ((low, -1), (high, 1)))
    return [Bounds(compress(low), compress(high))]


def _moved_by(end: Tensor, offset: Tensor, sign: int) -> Tensor:
    """The sum, moved outwards by more than its rounding."""
    slack = _ROUNDING * (end.abs() + offset.abs())
    return torch.where(end.isinf(), end, end + offset + sign * slack)


@_range(_POOLS)
def _pooled(step: Step, operands: list[Bounds | None]) -> Bounds | list[Bounds] | None:
    """Averages and maxima of positions; zeros of the padding may be among them."""
    bound, x = step.bound(), operands[0]
    axes = _spatial(step.name)
    if x is None or bound.get("divisor_override") is not None or x.low.dim() != axes + 2:
        return None
    dims = list(range(2, axes + 2))
    low, high = x.low.amin(dims, True), x.high.amax(dims, True)
    if step.name.startswith("avg_pool") and bound["count_include_pad"]:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if isinstance(step.value, (tuple, list)):
        return [Bounds(low, high)]
    return _widened(Bounds(low, high))


def _spatial(name: str) -> int:
    """The axes that a pooling goes over, by its name."""
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


@_range("mean amax amin")
def _reduced(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    """Between the least and the largest entry, however many there are."""
    bound, x = step.bound(), operands[0]
    if x is None:
        return None
    dims = reduced_axes(bound, x.low.dim())
    keep = bound.get("keepdim", False)
    return _widened(Bounds(x.low.amin(dims, keep), x.high.amax(dims, keep)))


@_range(" ".join(sorted({name.split(".")[0] for name in MOVES.split()})))
def _moved(step: Step, operands: list[Bounds | None]) -> Bounds | list[Bounds] | None:
    x, source = operands[0], step.facts()[0]
    if x is None:
        return None
    low, high = (moved(step, source, end) for end in (x.low, x.high))
    if isinstance(step.value, Tensor):
        return Bounds(low, high)
    return [Bounds(*ends) for ends in zip(low, high, strict=True)]


@_range("cat concat concatenate stack")
def _joined(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    known = {
        id(facts): bounds
        for facts, bounds in zip(step.facts(), operands, strict=True)
        if bounds is not None
    }
    if len(known) < len(operands):
        return None
    low = step.rerun(lambda facts: known[id(facts)].low.expand(facts.shape))
    high = step.rerun(lambda facts: known[id(facts)].high.expand(facts.shape))
    return Bounds(compress(low), compress(high))


@_range("leaf")
def _leaf(step: Step, operands: list[Bounds | None]) -> Bounds | None:
    module, x = site_of(step.args[1]).module, operands[0]
    if x is None or not isinstance(module, InputSelect):
        return None
    shape = step.facts()[0].shape
    axis = module.dim % len(shape)

    def chosen(end: Tensor) -> Tensor:
        spread = [size if a == axis else end.shape[a] for a, size in enumerate(shape)]
        return compress(end.expand(spread).index_select(axis, module.index))

    return Bounds(chosen(x.low), chosen(x.high))
