"""Scenes for the tests of splat2d, and an oracle in float64 that shares no code with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CUTOFF = 2 * math.log(255)
#: A pair nearer to the cut than this may be drawn in one precision and not in another: by a wide
#: margin, and by what float32 needs.
BORDER, NARROW_BORDER = 1e-3, 1e-4


@dataclass(frozen=True)
class Scene:
    """Gaussians (B, N, ...) and the image they are drawn on."""

    mu: Tensor
    chol: Tensor
    feat: Tensor
    size: tuple[int, int]


def random_scene(
    batch: int, n: int, channels: int, size: tuple[int, int], *, sigma: float = 2.0, seed: int = 0
) -> Scene:
    """Uniform positions, some beyond the border; sheared ellipses around a mean sigma; float32."""
    g = torch.Generator().manual_seed(seed)
    height, width = size
    extent = torch.tensor([width + 4.0, height + 4.0])
    mu = torch.rand(batch, n, 2, generator=g) * extent - 2.5
    z = torch.randn(batch, n, 3, generator=g)
    l1, l3 = sigma * (0.3 * z[..., 0]).exp(), sigma * (0.3 * z[..., 1]).exp()
    chol = torch.stack([l1, 0.5 * l1 * z[..., 2], l3], -1)
    return Scene(mu, chol, torch.randn(batch, n, channels, generator=g), size)


def clear_scene(
    batch: int,
    n: int,
    channels: int,
    size: tuple[int, int],
    *,
    sigma: float = 2.0,
    cutoff: float = CUTOFF,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> Scene:
    """The first random scene without a pair at the border of the cut, in any of the types."""
    for seed in range(200):
        scene = random_scene(batch, n, channels, size, sigma=sigma, seed=seed)
        cast = (Terms(scene.mu.to(t), scene.chol.to(t), size, cutoff) for t in dtypes)
        if not any(bool(terms.near(NARROW_BORDER).any()) for terms in cast):
            return scene
    raise AssertionError("no scene without a borderline pair")


class Terms:
    """Every Gaussian at every pixel, (B, N, H, W), in float64."""

    def __init__(self, mu: Tensor, chol: Tensor, size: tuple[int, int], cutoff: float) -> None:
        mx, my = (t[..., None, None] for t in mu.double().unbind(-1))
        l1, l2, l3 = (t[..., None, None] for t in chol.double().unbind(-1))
        y = torch.arange(size[0], dtype=torch.float64)[:, None]
        x = torch.arange(size[1], dtype=torch.float64)
        self.l1, self.l3, self.k = l1, l3, l2 / l3
        self.u = (x - mx) / l1
        self.e = (y - my) / l3
        self.v = self.e - self.k * self.u
        self.q = self.u.square() + self.v.square()
        self.w = torch.where(self.q <= cutoff, (-self.q / 2).exp(), 0.0)
        self.cutoff = cutoff

    def near(self, distance: float) -> Tensor:
        """Pairs whose q is this near to the cut."""
        return (self.q - self.cutoff).abs() < distance

    @property
    def sensitivity(self) -> Tensor:
        """1 + how much q changes, in units of the relative rounding errors of u and v."""
        return 1 + self.u.square() + self.v.abs() * (self.e.abs() + (self.k * self.u).abs())

    def image(self, feat: Tensor) -> Tensor:  # (B, C, H, W)
        return torch.einsum("bnhw,bnc->bchw", self.w, feat.double())

    def _weights(self, precision: torch.dtype) -> Tensor:
        """Weights times their sensitivity, and those lost whole that are no normal numbers.

        Twice the smallest normal number, because rounding may put a weight below it.
        """
        limits = torch.finfo(precision)
        lost = torch.where(self.w < 2 * limits.tiny, self.w / limits.eps, 0.0)
        return torch.where(self.w > 0, self.w * self.sensitivity + lost, 0.0)

    def image_magnitude(self, feat: Tensor, precision: torch.dtype) -> Tensor:
        terms = self._weights(precision)
        return torch.einsum("bnhw,bnc->bchw", terms, feat.double().abs())

    def gradients(self, grad: Tensor, feat: Tensor) -> tuple[Tensor, ...]:
        """Of mu, chol and feat, and the sum of magnitudes."""
        s = self.w * torch.einsum("bnc,bchw->bnhw", feat.double(), grad.double())
        return self._moments(s, self.w, grad.double(), signed=True)

    def gradient_magnitudes(
        self, grad: Tensor, feat: Tensor, precision: torch.dtype
    ) -> tuple[Tensor, ...]:
        weight = self._weights(precision)
        g = grad.double().abs()
        s = weight * torch.einsum("bnc,bchw->bnhw", feat.double().abs(), g)
        return self._moments(s, weight, g, signed=False)

    def _moments(self, s: Tensor, w: Tensor, grad: Tensor, *, signed: bool) -> tuple[Tensor, ...]:
        u, v, k = (
            (self.u, self.v, self.k) if signed else (self.u.abs(), self.v.abs(), -self.k.abs())
        )
        s = torch.where(self.w > 0, s, 0.0)
        if not signed:
            v = v.maximum(self.e.abs() + (self.k * self.u).abs())
        x, y = s * (u - k * v) / self.l1, s * v / self.l3
        parts = (x * u, y * u, y * v)
        return (
            torch.stack([x.sum((2, 3)), y.sum((2, 3))], -1),
            torch.stack([t.sum((2, 3)) for t in parts], -1),
            torch.einsum("bnhw,bchw->bnc", w, grad),
            torch.stack([x.abs().sum((2, 3)), y.abs().sum((2, 3))], -1),
        )
