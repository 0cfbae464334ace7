"""The pruning half of a cycle: its score, its finish, and what happens to units that died."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sapwood.minimize.release import evaluating
from sapwood.pruning._session import Session
from sapwood.pruning.criteria import Criterion, Magnitude
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.structure_criteria import ActivationMagnitude, GroupScore

Loss = Callable[[Tensor, Tensor], Tensor]

_RISE = 1e-3  # of the calibration loss, relative, for what the finish step takes at once
_MOST_TRIALS = 100
_DECAY = 0.9
_LOOK_EVERY = 10  # steps; the masks change rarely


def score_criterion(score: str | Criterion, inputs: Tensor) -> Criterion:
    """A criterion by the names that :class:`SqueezeRelease` knows, observing ``inputs``."""
    if not isinstance(score, str):
        return score
    if score == "magnitude":
        return Magnitude()
    return GroupScore(inputs) if score == "group" else ActivationMagnitude(inputs)


class Unused:
    """Lets the biases of units that nothing feeds any more decay to zero while training goes on.

    A dead unit with a bias is a constant, which is removed exactly; but in a residual stream that
    a padded depthwise convolution reads, only a constant of zero leaves no trace at the border.
    """

    def __init__(self, model: nn.Module, pruner: Pruner) -> None:
        self._model, self._pruner = model, pruner
        self._empty: list[tuple[Tensor, Tensor]] = []  # bias, bool of its rows
        self._of: MaskSet | None = None

    def __call__(self, session: Session) -> None:
        """Called after every optimizer step."""
        if session.step % _LOOK_EVERY and not self._pruner.finished:
            return
        if self._of is not self._pruner.masks:
            self._of = self._pruner.masks
            self._empty = list(self._find(self._pruner.masks))
        with torch.no_grad():
            for bias, empty in self._empty:
                decay = 0.0 if self._pruner.finished else _DECAY
                bias[empty] *= decay

    def _find(self, masks: MaskSet) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for name, mask in masks.items():
            path, _, key = name.rpartition(".")
            bias = getattr(self._model.get_submodule(path), "bias", None)
            if key != "weight" or not isinstance(bias, nn.Parameter) or mask.dim() < 2:
                continue
            empty = ~mask.flatten(1).any(1)
            if bool(empty.any()) and len(bias) == len(empty):
                found.append((bias, empty))
        return found


@dataclass(frozen=True)
class _Line:
    """A row (axis 0) or a column (axis 1) of one weight, and what it weighs."""

    name: str
    axis: int
    index: int
    size: float


def finish(
    model: nn.Module, masks: MaskSet, batch: tuple[Tensor, Tensor], loss_fn: Loss, most: int
) -> MaskSet:
    """Zeroes nearly empty rows and columns where the loss on a batch hardly rises.

    Sets of them are tried together, smallest weights first, and halved where the loss rises too
    much; at most 100 losses are computed.

    Args:
        model: with ``masks`` applied; changed in place.
        masks: of weights with rows and columns.
        batch: (X, y).
        loss_fn: (output, y) -> scalar.
        most: rows and columns of at most this many kept weights are candidates.

    Returns:
        The masks that hold afterwards.
    """
    weights = {name: model.get_parameter(name) for name in masks}
    keep = {name: mask.clone() for name, mask in masks.items()}
    lines = sorted(_thin_lines(weights, keep, most), key=lambda line: line.size)
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in batch)

    def loss() -> float:
        return float(loss_fn(model(x), y))

    with evaluating(model), torch.no_grad():
        present, trials = loss(), 0
        waiting = [lines] if lines else []
        while waiting and trials < _MOST_TRIALS:
            group = waiting.pop(0)
            before = [(line.name, *_cut(weights, keep, line)) for line in group]
            found, trials = loss(), trials + 1
            if found <= present * (1 + _RISE):
                present = found
                continue
            for name, where, values, kept in reversed(before):
                weights[name].data[where] = values
                keep[name][where] = kept
            if len(group) > 1:
                half = len(group) // 2
                waiting += [group[:half], group[half:]]
    return MaskSet(keep, aliases=masks.aliases, metadata=masks.metadata)


def _thin_lines(
    weights: dict[str, nn.Parameter], keep: dict[str, Tensor], most: int
) -> list[_Line]:
    found = []
    for name, mask in keep.items():
        if mask.dim() < 2:
            continue
        for axis in (0, 1):
            others = [dim for dim in range(mask.dim()) if dim != axis]
            counts = mask.sum(others)
            sizes = weights[name].detach().square().sum(others)
            thin = ((counts > 0) & (counts <= most)).nonzero().flatten().tolist()
            found += [_Line(name, axis, index, float(sizes[index])) for index in thin]
    return found


def _cut(
    weights: dict[str, nn.Parameter], keep: dict[str, Tensor], line: _Line
) -> tuple[tuple[slice | int, ...], Tensor, Tensor]:
    """Zeroes one line; returns where it is and what was there."""
    where = (line.index,) if line.axis == 0 else (slice(None), line.index)
    weight, mask = weights[line.name].data, keep[line.name]
    before = weight[where].clone(), mask[where].clone()
    weight[where] = 0.0
    mask[where] = False
    return where, *before
