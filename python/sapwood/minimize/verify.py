"""The proof by trial: both networks on the same inputs in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sapwood.minimize._trace import Inputs

__all__ = ["TOLERANCE", "difference", "draws"]

#: Largest difference in float64, relative to the largest output or to 1.
TOLERANCE = 1e-9


def difference(one: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest |difference| of two float64 models over max(1, the largest |output|).

    Outputs that are not floating point must be equal. NaN and infinities must stand at the same
    places.
    """
    with torch.no_grad():
        first, second = (_outputs(model, inputs) for model in (one, other))
    if len(first) != len(second):
        return float("inf")
    return max((_distance(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Any]:
    # A model may change its inputs in place.
    fresh = inputs.map(lambda t: t.clone())
    with torch.random.fork_rng(devices=[]):
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
