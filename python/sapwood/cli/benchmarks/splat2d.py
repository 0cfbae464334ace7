"""The splat2d family against its peers: what each provider runs stands here in full.

Gaussians at uniform positions, about a dozen on every pixel, three channels. ``dense`` is plain
torch: every Gaussian at every pixel, in chunks that stay in cache, and one product with the
features. ``culled`` is plain torch as well: the same on tiles of 32 x 32 pixels, each with the
Gaussians whose bounding box reaches it. There is no other peer on a CPU: gsplat and its forks, and
taichi-splatting, render on CUDA only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sapwood._measure import Call
from sapwood.cli.benchmarks.runner import WrongResult
from sapwood.ops import splat2d, splat2d_backward, splat2d_pairs
from sapwood.ops.splat2d import DEFAULT_CUTOFF
from sapwood.reference import splat2d as reference

PROVIDERS = ("dense", "sapwood", "culled")
OPS = ("splat2d", "splat2d_backward", "splat2d_pairs")
#: Largest error of a result, relative to the largest value of the one in float64.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}
CHUNK = 1 << 18  # weights that dense torch holds at a time: 1 MB, faster than all at once
TILE = 32
#: A pair this near to the cut may be drawn by one provider and not by another; it is moved away.
BORDER = 1e-3


@dataclass(frozen=True)
class Splat2dCase:
    """One op at one size."""

    op: str
    height: int
    width: int
    n: int
    dtype: str = "float32"
    device: str = "cpu"
    baseline: str = "dense"

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width} N={self.n}"

    @property
    def providers(self) -> tuple[str, ...]:
        return PROVIDERS if self.op != "splat2d_pairs" else ("dense", "sapwood")

    def build(self, provider: str) -> Call:
        return _BUILDERS[self.op](self, problem_of(self), provider)

    def check(self, provider: str, result: object) -> None:
        error = _error(self, result)
        if not error <= TOLERANCE[self.dtype]:
            raise WrongResult(
                f"{self.op} {self.name}: {provider} is off by {error:.1e}, "
                f"allowed are {TOLERANCE[self.dtype]:.0e}"
            )


@dataclass(frozen=True)
class Problem:
    """Gaussians (N, ...) and a gradient (3, H, W)."""

    mu: Tensor
    chol: Tensor
    feat: Tensor
    grad: Tensor

    @property
    def gaussians(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.chol, self.feat


@lru_cache(maxsize=1)  # the providers of a case follow one another; a sweep must not pile up
def problem_of(case: Splat2dCase) -> Problem:
    """The Gaussians of a case, from a fixed seed."""
    g = torch.Generator().manual_seed(0)
    mu = torch.rand(case.n, 2, generator=g) * torch.tensor([case.width, case.height]) - 0.5
    z = torch.randn(case.n, 3, generator=g)
    sigma = 0.6 * math.sqrt(case.height * case.width / case.n)
    l1, l3 = sigma * (0.3 * z[:, 0]).exp(), sigma * (0.3 * z[:, 1]).exp()
    chol = torch.stack([l1, 0.3 * l1 * z[:, 2], l3], -1)
    _move_from_the_border(mu, chol, case.height, case.width)
    tensors = (
        mu,
        chol,
        torch.randn(case.n, 3, generator=g),
        torch.randn(3, case.height, case.width, generator=g),
    )
    dtype = getattr(torch, case.dtype)
    return Problem(*(t.to(case.device, dtype) for t in tensors))


def _move_from_the_border(mu: Tensor, chol: Tensor, height: int, width: int) -> None:
    """Shrinks Gaussians with a pixel at the border of the cut, until there are none."""
    while True:
        found = [
            (_squares(mu[at].double(), chol[at].double(), height, width) - DEFAULT_CUTOFF)
            .abs()
            .flatten(1)
            .amin(1)
            < BORDER / 10
            for at in _chunks(len(mu), height * width)
        ]
        near = torch.cat(found)
        if not bool(near.any()):
            return
        chol[near] *= 0.999


def cases(*, quick: bool, device: str = "cpu", dtype: str = "float32") -> Iterator[Splat2dCase]:
    """The sweep: small images in the quick one, up to 256 x 256 in the full one."""
    sizes = [(64, 64, 200), (128, 128, 500)]
    for height, width, n in sizes if quick else [*sizes, (256, 256, 2500)]:
        for op in OPS:
            yield Splat2dCase(op, height, width, n, dtype, device)


# plain torch --------------------------------------------------------------------------------------


def _chunks(n: int, pixels: int) -> Iterator[slice]:
    step = max(1, CHUNK // pixels)
    for first in range(0, n, step):
        yield slice(first, first + step)


def _squares(
    mu: Tensor, chol: Tensor, height: int, width: int, x0: int = 0, y0: int = 0
) -> Tensor:  # (N, H, W)
    x = torch.arange(x0, x0 + width, dtype=mu.dtype, device=mu.device) - mu[:, :1]
    y = torch.arange(y0, y0 + height, dtype=mu.dtype, device=mu.device) - mu[:, 1:]
    l1, l2, l3 = chol.T[..., None]
    u = x / l1
    v = (y / l3)[:, :, None] - (l2 / l3 * u)[:, None, :]
    return v.square_() + u.square()[:, None, :] if not v.requires_grad else _sum(u, v)


def _sum(u: Tensor, v: Tensor) -> Tensor:
    return v.square() + u.square()[:, None, :]


def _weights(q: Tensor) -> Tensor:
    seen = q.clamp(max=DEFAULT_CUTOFF)  # exp is many times slower where it underflows
    return torch.where(q <= DEFAULT_CUTOFF, (-0.5 * seen).exp(), 0.0)


def _dense(mu: Tensor, chol: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
    image = feat.new_zeros(feat.shape[1], height * width)
    for at in _chunks(len(mu), height * width):
        w = _weights(_squares(mu[at], chol[at], height, width))
        image = torch.addmm(image, feat[at].T, w.flatten(1))
    return image.view(-1, height, width)


def _culled(mu: Tensor, chol: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
    reach = DEFAULT_CUTOFF**0.5
    side, rise = reach * chol[:, 0].detach(), reach * chol[:, 1:].detach().norm(dim=1)
    mx, my = mu.detach().unbind(1)
    rows = []
    for y in range(0, height, TILE):
        h = min(TILE, height - y)
        in_rows = (my + rise >= y) & (my - rise <= y + h - 1)
        tiles = []
        for x in range(0, width, TILE):
            w = min(TILE, width - x)
            ids = (in_rows & (mx + side >= x) & (mx - side <= x + w - 1)).nonzero().squeeze(1)
            weights = _weights(_squares(mu[ids], chol[ids], h, w, x, y))
            tiles.append((feat[ids].T @ weights.flatten(1)).view(-1, h, w))
        rows.append(torch.cat(tiles, 2))
    return torch.cat(rows, 1)


_BY_TORCH = {"dense": _dense, "culled": _culled}


def _image(case: Splat2dCase, p: Problem, provider: str) -> Call:
    size = (case.height, case.width)
    if provider == "sapwood":
        return lambda: splat2d(*p.gaussians, size, validate=False)
    return lambda: _BY_TORCH[provider](*p.gaussians, *size)


def _gradients(case: Splat2dCase, p: Problem, provider: str) -> Call:
    """Of the image in all three arguments; torch's own pass renders first, sapwood's need not."""
    if provider == "sapwood":

        def low_level() -> Any:
            splat2d(*p.gaussians, (case.height, case.width), validate=False)
            return splat2d_backward(p.grad, *p.gaussians, validate=False)[:3]

        return low_level
    leaves = [t.clone().requires_grad_() for t in p.gaussians]

    def by_autograd() -> Any:
        mu, chol, feat = leaves
        image = _BY_TORCH[provider](mu, chol, feat, case.height, case.width)
        return torch.autograd.grad(image, leaves, p.grad)

    return by_autograd


def _pairs(case: Splat2dCase, p: Problem, provider: str) -> Call:
    size = (case.height, case.width)
    if provider == "sapwood":
        return lambda: splat2d_pairs(p.mu, p.chol, size)

    def dense() -> Tensor:
        counts = [
            (_squares(p.mu[at], p.chol[at], *size) <= DEFAULT_CUTOFF).sum()
            for at in _chunks(case.n, case.height * case.width)
        ]
        return torch.stack(counts).sum()

    return dense


_BUILDERS = {"splat2d": _image, "splat2d_backward": _gradients, "splat2d_pairs": _pairs}


# checks against float64 ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _exact(case: Splat2dCase) -> tuple[Tensor, ...]:
    p = problem_of(case)
    mu, chol, feat, grad = (t.double()[None] for t in (p.mu, p.chol, p.feat, p.grad))
    if case.op == "splat2d":
        return (
            reference.splat2d(mu, chol, feat, None, case.height, case.width, DEFAULT_CUTOFF)[0],
        )
    if case.op == "splat2d_pairs":
        size = (case.height, case.width)
        return (reference.splat2d_pairs(mu, chol, None, *size, DEFAULT_CUTOFF)[0],)
    grads = reference.splat2d_backward(grad, mu, chol, feat, None, DEFAULT_CUTOFF, False)
    return tuple(t[0] for t in grads[:3])


def _error(case: Splat2dCase, result: Any) -> float:
    found = result if isinstance(result, tuple | list) else (result,)
    return max(
        float((actual.double() - exact).abs().max() / exact.abs().max())
        for actual, exact in zip(found, _exact(case), strict=True)
    )
