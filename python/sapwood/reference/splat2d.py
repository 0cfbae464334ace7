"""Sums of 2D Gaussians on the pixel grid, in plain torch::

    dx = i - mx,  dy = j - my,  u = dx / l1,  v = (dy - l2 u) / l3        pixel (i, j)
    w = exp(-(u^2 + v^2) / 2) where u^2 + v^2 <= cutoff, else 0
    image(c, j, i) = sum_n w_n(i, j) feat_n(c)

(u, v) is L^-1 (p - mu) with L = [[l1, 0], [l2, l3]]. A Gaussian whose position or shape is not
finite, or whose l1 or l3 is not positive, is not drawn and has gradient 0. Functions named as an op
of ``csrc/schema.cpp`` have its signature. Half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements of the largest intermediate


def widened(x: Tensor) -> Tensor:
    """The type that sums are taken in: float32 for half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def drawn(mu: Tensor, chol: Tensor, counts: Tensor | None) -> Tensor:  # (B, N) bool
    """Which Gaussians exist and have a finite position and shape."""
    real = mu.isfinite().all(-1) & chol.isfinite().all(-1)
    real = real & (chol[..., 0] > 0) & (chol[..., 2] > 0)
    if counts is not None:
        real = real & (torch.arange(mu.shape[1], device=mu.device) < counts[:, None])
    return real


class _Chunk:
    """Some of the Gaussians against all pixels."""

    def __init__(
        self,
        mu: Tensor,  # (B, n, 2)
        chol: Tensor,  # (B, n, 3)
        real: Tensor,  # (B, n)
        height: int,
        width: int,
        cutoff: float,
    ) -> None:
        mu = torch.where(real[..., None], mu, 0.0)
        chol = torch.where(real[..., None], chol, chol.new_tensor([1.0, 0.0, 1.0]))
        self.l1, self.l2, self.l3 = (t[..., None, None] for t in chol.unbind(-1))  # (B, n, 1, 1)
        mx, my = (m[..., None, None] for m in mu.unbind(-1))
        dx = torch.arange(width, dtype=mu.dtype, device=mu.device) - mx  # (B, n, 1, W)
        dy = torch.arange(height, dtype=mu.dtype, device=mu.device)[:, None] - my  # (B, n, H, 1)
        u = dx / self.l1
        v = (dy - self.l2 * u) / self.l3
        q = u * u + v * v  # (B, n, H, W)
        self.inside = (q <= cutoff) & real[..., None, None]
        self.u, self.v = torch.where(self.inside, u, 0.0), torch.where(self.inside, v, 0.0)
        self.w = torch.where(self.inside, (-torch.where(self.inside, q, 0.0) / 2).exp(), 0.0)


def _chunks(
    mu: Tensor, chol: Tensor, counts: Tensor | None, height: int, width: int, cutoff: float, c: int
) -> Iterator[tuple[slice, _Chunk]]:
    real = drawn(mu, chol, counts)
    step = max(1, _CHUNK // max(1, mu.shape[0] * height * width * max(1, c)))
    for first in range(0, mu.shape[1], step):
        at = slice(first, first + step)
        yield at, _Chunk(mu[:, at], chol[:, at], real[:, at], height, width, cutoff)


def _visible(cutoff: float, dtype: torch.dtype) -> float:
    """Beyond this the weight would be below the smallest normal number, and is taken as 0."""
    return min(cutoff, -2 * math.log(torch.finfo(dtype).tiny))


def splat2d(
    mu: Tensor,  # (B, N, 2)
    chol: Tensor,  # (B, N, 3)
    feat: Tensor,  # (B, N, C)
    counts: Tensor | None,  # (B,)
    height: int,
    width: int,
    cutoff: float,
) -> Tensor:  # (B, C, H, W)
    wide_mu, wide_chol, wide = widened(mu), widened(chol), widened(feat)
    image = wide.new_zeros(mu.shape[0], feat.shape[2], height, width)
    limit = _visible(cutoff, wide_mu.dtype)
    for at, g in _chunks(wide_mu, wide_chol, counts, height, width, limit, feat.shape[2]):
        terms = g.w[:, :, None] * wide[:, at, :, None, None]  # (B, n, C, H, W)
        image = image + torch.where(g.inside[:, :, None], terms, 0.0).sum(1)
    return image.to(mu.dtype)


def splat2d_backward(
    grad: Tensor,  # (B, C, H, W)
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    cutoff: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # like mu, chol, feat; (B, N or 0, 2)
    """Moments of s = w <feat, grad> over the pixels of each Gaussian."""
    wide_mu, wide_chol, wide, g_image = (widened(t) for t in (mu, chol, feat, grad))
    height, width = grad.shape[2:]
    limit = _visible(cutoff, wide_mu.dtype)
    parts: list[tuple[Tensor, ...]] = []
    for at, g in _chunks(wide_mu, wide_chol, counts, height, width, limit, feat.shape[2]):
        inside, pixels = g.inside[:, :, None], g_image[:, None]  # (B, n, 1, H, W), (B, 1, C, H, W)
        weighted = torch.where(inside, g.w[:, :, None] * pixels, 0.0)
        s = torch.where(inside, weighted * wide[:, at, :, None, None], 0.0).sum(2)
        su, sv = s * g.u, s * g.v
        at_x, at_y = (su - g.l2 / g.l3 * sv) / g.l1, sv / g.l3  # each pixel's part of d mu
        mean = torch.stack([at_x.sum((2, 3)), at_y.sum((2, 3))], -1)
        l1 = (su * g.u - g.l2 / g.l3 * su * g.v) / g.l1
        shape = torch.stack([t.sum((2, 3)) for t in (l1, su * g.v / g.l3, sv * g.v / g.l3)], -1)
        size = torch.stack([at_x.abs().sum((2, 3)), at_y.abs().sum((2, 3))], -1)
        parts.append(
            (mean, shape, weighted.sum((3, 4)), size[:, :, :] if with_stats else size[:, :0])
        )
    if not parts:
        zeros = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (mu, chol, feat)
        ]
        return zeros[0], zeros[1], zeros[2], mu.new_zeros(mu.shape[0], 0, 2)
    d_mu, d_chol, d_feat, stats = (torch.cat(p, 1).to(mu.dtype) for p in zip(*parts, strict=True))
    return d_mu, d_chol, d_feat, stats


def splat2d_pairs(
    mu: Tensor, chol: Tensor, counts: Tensor | None, height: int, width: int, cutoff: float
) -> Tensor:  # (B,) int64
    """How many (pixel, Gaussian) pairs have a weight."""
    wide_mu, wide_chol = widened(mu), widened(chol)
    total = torch.zeros(mu.shape[0], dtype=torch.int64, device=mu.device)
    for _, g in _chunks(wide_mu, wide_chol, counts, height, width, cutoff, 1):
        total = total + g.inside.sum((1, 2, 3))
    return total
