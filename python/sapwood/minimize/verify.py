"""The proof by trial: both networks on the same inputs in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sapwood.minimize._promises import Promises
from sapwood.minimize._trace import Inputs
from sapwood.minimize.report import Cost, cost

__all__ = ["TOLERANCE", "Observation", "Reference", "difference", "draws"]

#: Largest difference in float64, relative to the largest output or to 1.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Reference:
    """What a float64 model computes from some inputs; the model itself is not needed any more."""

    inputs: Inputs
    outputs: list[Any]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> Reference:
        """Runs the model."""
        return cls(inputs, _outputs(model, inputs))


def difference(expected: Reference, model: nn.Module) -> float:
    """The largest |difference| of a float64 model's outputs over max(1, the largest |output|).

    Outputs that are not floating point must be equal. NaN and infinities must stand at the same
    places.
    """
    first, second = expected.outputs, _outputs(model, expected.inputs)
    if len(first) != len(second):
        return float("inf")
    return max((_distance(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Any]:
    # A model may change its inputs in place.
    fresh = inputs.map(lambda t: t.clone())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout that is left in training mode
        output = model(*fresh.args, **fresh.kwargs)
    return [x for x in _pytree.tree_leaves(output) if x is not None]


def _distance(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a == b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = torch.isfinite(a)
    if not torch.equal(torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])):
        return float("inf")
    scale = max(1.0, a[finite].abs().max().item() if bool(finite.any()) else 0.0)
    gap = (a[finite] - b[finite]).abs()
    return gap.max().item() / scale if len(gap) else 0.0


def draws(inputs: Inputs, count: int, seed: int = 0) -> Iterator[Inputs]:
    """Random inputs of the example's shapes: normal numbers, or the example's integers shuffled.

    The tensors are fresh and may be written to.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator, dtype=t.dtype)
        flat = t.flatten()
        return flat[torch.randperm(len(flat), generator=generator)].reshape(t.shape)

    for _ in range(count):
        yield inputs.map(draw)


class Observation:
    """What report and verification need of the float64 model, taken while it exists.

    Args:
        inputs: the example.
        promises: kept by the random inputs too.
        verify: run the model at all.
    """

    cost: Cost

    def __init__(self, inputs: Inputs, promises: Promises, verify: bool) -> None:
        self.inputs, self.expected = inputs, list[Reference]()
        self._promises, self._verify = promises, verify

    def __call__(self, exact: nn.Module) -> None:
        """Counts the model, and runs it on the example and on two random inputs."""
        self.cost = cost(exact, self.inputs)
        if self._verify:
            drawn = [self._promises.kept(exact, inputs) for inputs in draws(self.inputs, 2)]
            self.expected = [Reference.of(exact, inputs) for inputs in (self.inputs, *drawn)]
