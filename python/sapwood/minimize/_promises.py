"""What a caller promises about inputs, checked against the example and kept in every draw."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize._trace import Inputs

__all__ = ["Promises", "channel_axis"]

_WHERE = "minimize"


def channel_axis(t: Tensor) -> int:
    """The axis of an input's channels: the last of (batch, tokens, channels), else 1."""
    return 2 if t.dim() == 3 else min(1, t.dim() - 1)


@dataclass(frozen=True)
class Promises:
    """What holds for every input.

    ``constants``: argument name -> channel -> the number that it always holds; ``ranges``: argument
    name -> the least and the largest entry, which may be infinite.
    """

    constants: dict[str, dict[int, float]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, promises: Mapping[str, Mapping[str, Any]] | None, model: nn.Module, inputs: Inputs
    ) -> Promises:
        """Reads ``{"input": {"constant": {channel: value}, "range": (low, high)}}``.

        ``"input"`` names the only argument of a model that has one.

        Raises:
            ValueError: if an argument or a kind of promise is unknown, a channel is out of range, a
                range is none, or the example breaks the promise.
        """
        arguments = _arguments(model, inputs)
        made = cls()
        for given, content in (promises or {}).items():
            name = next(iter(arguments)) if given == "input" and len(arguments) == 1 else given
            if name not in arguments:
                expected = f"name arguments of the model ({', '.join(arguments)})"
                _check.fail(ValueError, _WHERE, "promises", expected, repr(given))
            if not content or not set(content) <= {"constant", "range"}:
                expected = 'promise "constant" or "range"'
                _check.fail(ValueError, _WHERE, "promises", expected, sorted(content))
            if "constant" in content:
                values = {int(channel): float(c) for channel, c in content["constant"].items()}
                _check_constants(name, arguments[name], values)
                made.constants[name] = values
            if "range" in content:
                made.ranges[name] = _checked_range(name, arguments[name], content["range"])
        return made

    def to_dict(self) -> dict[str, Any]:
        """As the caller gave them, for reports and files; an open end of a range is None."""
        names = [*self.constants, *(name for name in self.ranges if name not in self.constants)]
        content: dict[str, Any] = {name: {} for name in names}
        for name, values in self.constants.items():
            content[name]["constant"] = {str(channel): c for channel, c in values.items()}
        for name, ends in self.ranges.items():
            content[name]["range"] = [end if math.isfinite(end) else None for end in ends]
        return content

    def kept(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """The same inputs, moved into the ranges, with the promised numbers in their places."""
        arguments = _arguments(model, inputs)
        for name, (low, high) in self.ranges.items():
            arguments[name].copy_(_into(arguments[name], low, high))
        for name, values in self.constants.items():
            x = arguments[name]
            for channel, c in values.items():
                x.select(channel_axis(x), channel).fill_(c)
        return inputs


def _into(x: Tensor, low: float, high: float) -> Tensor:
    """Normal numbers made uniform in a range, or folded over its end if it has only one."""
    if math.isinf(low) and math.isinf(high):
        return x
    if math.isinf(high):
        return low + x.abs()
    if math.isinf(low):
        return high - x.abs()
    uniform: Tensor = torch.special.ndtr(x)
    return low + (high - low) * uniform


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: x for name, x in bound.arguments.items() if isinstance(x, Tensor)}


def _check_constants(name: str, x: Tensor, values: Mapping[int, float]) -> None:
    axis = channel_axis(x)
    for channel, c in values.items():
        if not 0 <= channel < x.shape[axis]:
            expected = f"name channels of {name} below {x.shape[axis]}"
            _check.fail(ValueError, _WHERE, "promises", expected, channel)
        if bool((x.select(axis, channel) != c).any()):
            expected = f"hold for the example, whose channel {channel} of {name} is not {c}"
            _check.fail(ValueError, _WHERE, "promises", expected, "other numbers")


def _checked_range(name: str, x: Tensor, ends: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not low <= high or not x.is_floating_point():
        expected = f"give the range of {name}, floating point, as (least, largest)"
        _check.fail(ValueError, _WHERE, "promises", expected, repr(ends))
    if bool(((x < low) | (x > high)).any()):
        expected = f"hold for the example, whose {name} leaves the range"
        _check.fail(ValueError, _WHERE, "promises", expected, f"({low}, {high})")
    return low, high
