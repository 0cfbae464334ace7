"""What a caller promises about inputs, checked against the example and kept in every draw."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """Argument name -> channel -> the number that it always holds."""

    constants: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, promises: Mapping[str, Mapping[str, Any]] | None, model: nn.Module, inputs: Inputs
    ) -> Promises:
        """Reads ``{"input": {"constant": {channel: value}}}``.

        ``"input"`` names the only argument of a model that has one.

        Raises:
            ValueError: if an argument or a kind of promise is unknown, a channel is out of range,
                or the example breaks the promise.
        """
        arguments = _arguments(model, inputs)
        constants: dict[str, dict[int, float]] = {}
        for given, content in (promises or {}).items():
            name = next(iter(arguments)) if given == "input" and len(arguments) == 1 else given
            if name not in arguments:
                expected = f"name arguments of the model ({', '.join(arguments)})"
                _check.fail(ValueError, _WHERE, "promises", expected, repr(given))
            if set(content) != {"constant"}:
                expected = "promise constants"
                _check.fail(ValueError, _WHERE, "promises", expected, sorted(content))
            values = {int(channel): float(c) for channel, c in content["constant"].items()}
            _check_example(name, arguments[name], values)
            constants[name] = values
        return cls(constants)

    def to_dict(self) -> dict[str, Any]:
        """As the caller gave them, for reports and files."""
        return {
            name: {"constant": {str(channel): c for channel, c in values.items()}}
            for name, values in self.constants.items()
        }

    def kept(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """The same inputs with the promised numbers in their places."""
        arguments = _arguments(model, inputs)
        for name, values in self.constants.items():
            x = arguments[name]
            for channel, c in values.items():
                x.select(channel_axis(x), channel).fill_(c)
        return inputs


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: x for name, x in bound.arguments.items() if isinstance(x, Tensor)}


def _check_example(name: str, x: Tensor, values: Mapping[int, float]) -> None:
    axis = channel_axis(x)
    for channel, c in values.items():
        if not 0 <= channel < x.shape[axis]:
            expected = f"name channels of {name} below {x.shape[axis]}"
            _check.fail(ValueError, _WHERE, "promises", expected, channel)
        if bool((x.select(axis, channel) != c).any()):
            expected = f"hold for the example, whose channel {channel} of {name} is not {c}"
            _check.fail(ValueError, _WHERE, "promises", expected, "other numbers")
