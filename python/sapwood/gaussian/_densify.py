"""Ways to grow from some of the Gaussians to all of them while the image is being fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.gaussian import _place
from sapwood.gaussian._parameters import Parameters
from sapwood.nn.splat2d import initial_sigma

_LARGE = 1.0  # pixels: standard deviation above which a Gaussian is split, below it is cloned
_SPLIT, _CLONE = 0.75, 0.25  # offset of the children, in standard deviations


class Densifier(Protocol):
    """Changes the Gaussians between two steps."""

    def first_count(self) -> int:
        """How many Gaussians an image begins with."""

    def due(self, step: int) -> bool:
        """Whether something happens before this step."""

    def wants_statistics(self, step: int) -> bool:
        """Whether ``observe`` needs this step's statistics."""

    def observe(self, statistics: Tensor) -> None:
        """Takes the sums of |dL/dmu| over pixels, (B, N, 2)."""

    def change(self, step: int, parameters: Parameters, render: Tensor, images: Tensor) -> None:
        """Adds, splits or removes Gaussians; render and images are (B, C, H, W)."""


@dataclass
class Fixed:
    """All Gaussians from the start."""

    target: int

    def first_count(self) -> int:
        return self.target

    def due(self, step: int) -> bool:
        return False

    def wants_statistics(self, step: int) -> bool:
        return False

    def observe(self, statistics: Tensor) -> None:
        """Nothing to see."""

    def change(self, step: int, parameters: Parameters, render: Tensor, images: Tensor) -> None:
        """Nothing to do."""


class ByError:
    """Adds Gaussians where the squared error is large, four times; ends with exactly the target.

    Adding by error is in the public code of Image-GS; the square, schedule and sizes are ours.
    """

    _START, _ROUNDS = 0.3, (0.15, 0.25, 0.35, 0.45)
    _SIZE = 0.45  # of what would cover the image

    def __init__(
        self, target: int, steps: int, mode: str, generators: list[torch.Generator]
    ) -> None:
        self._target, self._mode, self._generators = target, mode, generators
        rest, rounds = target - self.first_count(), len(self._ROUNDS)
        #: Step -> number of Gaussians from there on; rounds of short runs coincide.
        self._counts = {
            int(share * steps): self.first_count() + rest * (index + 1) // rounds
            for index, share in enumerate(self._ROUNDS)
        }

    def first_count(self) -> int:
        return max(1, math.ceil(self._START * self._target))

    def due(self, step: int) -> bool:
        return step in self._counts

    def wants_statistics(self, step: int) -> bool:
        return False

    def observe(self, statistics: Tensor) -> None:
        """Nothing to see."""

    def change(self, step: int, parameters: Parameters, render: Tensor, images: Tensor) -> None:
        sigma = self._SIZE * initial_sigma((images.shape[2], images.shape[3]), self._target)
        for item, generator in enumerate(self._generators):
            missing = self._counts[step] - parameters.counts[item]
            residual = images[item] - render[item]  # (C, H, W)
            mu = _place.sample(residual.square().mean(0), missing, generator)
            # in a mean a new colour replaces what is there, in a sum it is added
            below = render[item] if self._mode == "norm" else torch.zeros_like(residual)
            feat = _place.colours_at(below + _place.FIRST_COLOUR * residual, mu)
            parameters.append(item, [mu, _place.round_shapes(mu, sigma), feat])


class BySplitting:
    """Splits and clones the Gaussians whose position is pulled hardest, and prunes faint ones.

    Split, clone and prune are those of 3D Gaussian splatting (arXiv:2308.04079), by the sum of
    absolute pixel gradients instead of the norm of their sum (arXiv:2404.10484); numbers are ours.
    """

    _START, _SHARE, _END = 0.8, 0.03, 0.7
    _LONGEST, _PARTS = 30, 50  # steps between rounds: at most, and rounds per run
    _FAINT = 1 / 255  # brightness times area, in pixels

    def __init__(self, target: int, steps: int, mode: str) -> None:
        self._target, self._mode = target, mode
        self._every = min(self._LONGEST, max(1, steps // self._PARTS))
        self._last = int(self._END * steps)
        self._sum: Tensor | None = None

    def first_count(self) -> int:
        return max(1, math.ceil(self._START * self._target))

    def due(self, step: int) -> bool:
        return step % self._every == 0 and 2 * self._every <= step <= self._last

    def wants_statistics(self, step: int) -> bool:
        return self._every <= step < self._last

    def observe(self, statistics: Tensor) -> None:
        self._sum = statistics.clone() if self._sum is None else self._sum.add_(statistics)

    def change(self, step: int, parameters: Parameters, render: Tensor, images: Tensor) -> None:
        if self._sum is None:
            return
        for item in range(len(images)):
            self._change(parameters, item, self._sum[item].norm(dim=-1))
        self._sum = None

    def _change(self, parameters: Parameters, item: int, pull: Tensor) -> None:
        n = parameters.counts[item]
        pull = pull[:n]
        if self._mode == "sum":  # in a mean, dark Gaussians are as visible as bright ones
            _, chol, feat = parameters.values.rows(item, slice(n))
            weight = feat.abs().amax(-1) * math.pi * chol[:, 0] * chol[:, 2]
            seen = (weight >= self._FAINT).nonzero()[:, 0]
            if 0 < len(seen) < n:
                parameters.keep(item, seen)
                pull, n = pull[seen], len(seen)
        count = min(math.ceil(self._SHARE * n), self._target - n)
        if count > 0:
            parents = pull.topk(min(count, n)).indices
            first, second = divide(parameters.values.rows(item, parents), _LARGE, self._mode)
            moments = parameters.replace(item, parents, first)
            parameters.append(item, second, moments)


def divide(parents: list[Tensor], limit: float, mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two Gaussians out of each: large ones part and shrink, small ones part a little.

    Along the long axis the children of a large one lie at +-0.75 standard deviations and are
    0.66 times as long, so that together they have the mean and the covariance of the parent;
    in a sum their colours are such that its integral stays, too. A small one is cloned: +-0.25
    standard deviations, the shape unchanged, in a sum half of the colour each.

    Args:
        parents: mu (n, 2), chol (n, 3), feat (n, C).
        limit: standard deviation along the long axis, in pixels, above which one counts as large.
        mode: in ``"sum"`` mode the children share the colour, in ``"norm"`` mode both have it.

    Returns:
        The values of the first and of the second children.
    """
    mu, chol, feat = parents
    sigma, axis = long_axis(chol)  # (n,), (n, 2)
    large = (sigma > limit)[:, None]  # (n, 1)
    offset = torch.where(large, _SPLIT, _CLONE) * sigma[:, None] * axis
    shrink = torch.where(large, math.sqrt(1 - _SPLIT**2), 1.0).to(chol.dtype)
    shape = shortened(chol, axis, shrink)
    colour = feat / (2 * shrink) if mode == "sum" else feat
    return [mu + offset, shape, colour], [mu - offset, shape.clone(), colour.clone()]


def shortened(chol: Tensor, axis: Tensor, factor: Tensor) -> Tensor:
    """Shapes (n, 3) with their extent along axes (n, 2) multiplied by factors (n, 1)."""
    l1, l2, l3 = chol.double().unbind(-1)
    axis, factor = axis.double(), factor.double().squeeze(-1)
    zero = torch.zeros_like(l1)
    columns = torch.stack([torch.stack([l1, l2], -1), torch.stack([zero, l3], -1)], -1)  # L
    along = (axis[:, None] @ columns).squeeze(1)  # (n, 2)
    top, bottom = (columns + ((factor - 1)[:, None] * axis)[..., None] * along[:, None]).unbind(1)
    first = top.norm(dim=-1)
    # the determinant of the new factor is that of the old times what the axis shrinks by
    return torch.stack([first, (top * bottom).sum(-1) / first, factor * l1 * l3 / first], -1).to(
        chol.dtype
    )


def long_axis(chol: Tensor) -> tuple[Tensor, Tensor]:
    """Largest standard deviation (n,) and its direction (n, 2), of L L^T with L from (n, 3)."""
    l1, l2, l3 = chol.double().unbind(-1)
    xx, xy, yy = l1 * l1, l1 * l2, l2 * l2 + l3 * l3
    angle = 0.5 * torch.atan2(2 * xy, xx - yy)
    axis = torch.stack([angle.cos(), angle.sin()], -1)
    variance = (xx + yy) / 2 + torch.hypot((xx - yy) / 2, xy)
    return variance.sqrt().to(chol.dtype), axis.to(chol.dtype)
