"""Arguments of the splat2d family: scenes without a pair at the very border of the cut."""

from __future__ import annotations

import math

import torch
from hypothesis import assume
from torch import Tensor

import tests.test_splat2d as batteries
from tests.properties.strategies import SIZES, Arguments, Property, Source
from tests.splat2d_scenes import CUTOFF, NARROW_BORDER, Terms

_CUTOFFS = (CUTOFF, 4.0, math.inf)
_ANY, _SIDE = (0, SIZES[-1]), (1, SIZES[-1])


def _scene(s: Source) -> tuple[Tensor, Tensor, Tensor | None, int, int, float]:
    """Centres, shapes, counts, and the image."""
    batch, n, height, width = s.sizes((0, 9), _ANY, _SIDE, _SIDE, most=65536)
    cutoff = s.pick(_CUTOFFS)
    middle = torch.tensor([width / 2, height / 2], dtype=s.dtype)
    mu = s.normal(batch, n, 2) * middle + middle
    z = s.normal(batch, n, 3)
    chol = torch.stack([(0.3 * z[..., 0]).exp(), 0.5 * z[..., 1], (0.3 * z[..., 2]).exp()], -1)
    counts = torch.randint(n + 1, (batch,), generator=s.generator) if s.flag() else None
    if math.isfinite(cutoff):
        assume(not bool(Terms(mu, chol, (height, width), cutoff).near(NARROW_BORDER).any()))
    return mu, chol, counts, height, width, cutoff


def _image(s: Source) -> Arguments:
    mu, chol, counts, height, width, cutoff = _scene(s)
    feat = s.normal(*mu.shape[:2], s.size(1))
    return mu, chol, feat, counts, height, width, cutoff


def _backward(s: Source) -> Arguments:
    mu, chol, counts, height, width, cutoff = _scene(s)
    channels = s.size(1)
    grad = s.normal(len(mu), channels, height, width)
    return grad, mu, chol, s.normal(*mu.shape[:2], channels), counts, cutoff, s.flag()


def _pairs(s: Source) -> Arguments:
    return _scene(s)


PROPERTIES = {
    "splat2d": Property(batteries.TestSplat2d, _image),
    "splat2d_backward": Property(batteries.TestSplat2dBackward, _backward),
    "splat2d_pairs": Property(batteries.TestSplat2dPairs, _pairs),
}
