"""Triton launchers of splat2d: the image of 2D Gaussians, and its gradients.

torch prepares each Gaussian and the box it can reach; a program draws a tile, or differentiates a
Gaussian. A tile keeps no list between rounds: it tests the boxes of a block of Gaussians, queues
those that reach it in the order of their ids, and draws them. Nothing is read back and no float is
added atomically.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import AotCase, Config, Wrap, cdiv, launch
from ._splat2d_kernels import splat2d_backward_kernel, splat2d_kernel

__all__ = ["AOT_CASES", "splat2d", "splat2d_backward"]

_DRAW = Config({"BLOCK_N": 512, "BLOCK_G": 8, "BLOCK_T": 16}, 4, 1)
_DIFFERENTIATE = Config({"BLOCK_Y": 8, "BLOCK_X": 16}, 1, 1)
_SCALE = math.sqrt(math.log2(math.e) / 2)  # folded into u and v: a weight is 2^-(u^2 + v^2)
_VISIBLE = 2 * math.log(2) * 126  # beyond this a weight is no normal number, and is taken as 0
_GROUP = 4  # channels of a launch


class _Prepared(NamedTuple):
    shape: Tensor  # (B * N, 5) float32
    box: Tensor  # (B * N, 4) int32
    limit: float


def _prepare(
    mu: Tensor, chol: Tensor, counts: Tensor | None, height: int, width: int, cutoff: float
) -> _Prepared:
    """Boxes are widened by a pixel and by what rounding can cost: q <= limit decides."""
    q = min(cutoff, _VISIBLE)
    real = mu.isfinite().all(-1) & chol.isfinite().all(-1)
    real = real & (chol[..., 0] > 0) & (chol[..., 2] > 0)
    if counts is not None:
        real = real & (torch.arange(mu.shape[1], device=mu.device) < counts[:, None])
    centre = torch.where(real[..., None], mu, 0.0).double()
    safe = torch.where(real[..., None], chol, chol.new_tensor([1.0, 0.0, 1.0])).double()
    l1, l2, l3 = safe.unbind(-1)
    most = torch.finfo(torch.float32).max
    parts = (*centre.unbind(-1), _SCALE / l1, _SCALE / l3, l2 / l3)
    shape = torch.stack(parts, -1).clamp(-most, most).float()
    reach = math.sqrt(q) * torch.stack([l1, (l2.square() + l3.square()).sqrt()], -1)
    margin = 1 + 1e-6 * (centre.abs() + reach)
    size = torch.tensor([width, height], dtype=torch.float64, device=mu.device)
    low = (centre - reach - margin).clamp(min=0).minimum(size)
    high = (centre + reach + margin + 1).clamp(min=0).minimum(size)
    box = torch.stack([low, high], -1).floor()  # (B, N, 2, 2): of x, of y
    box = torch.where(real[..., None, None], box, 0.0)
    return _Prepared(shape.flatten(0, 1), box.flatten(2).flatten(0, 1).int(), q * _SCALE**2)


def splat2d(
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    height: int,
    width: int,
    cutoff: float,
    *,
    wrap: Wrap | None = None,
) -> Tensor:
    """The image of a batch of Gaussians.

    Args:
        mu: (B, N, 2) float32, float16 or bfloat16; computed in float32.
        chol: (B, N, 3).
        feat: (B, N, C).
        counts: (B,) int64 or None.
        height: of the image.
        width: of the image.
        cutoff: the largest q that is drawn.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, C, H, W) of mu's dtype.
    """
    batch, n, channels = feat.shape
    image = torch.empty(batch, channels, height, width, device=mu.device)
    if batch == 0 or n == 0:
        return image.zero_().to(mu.dtype)
    g = _prepare(mu.float(), chol.float(), counts, height, width, cutoff)
    features = feat.float().contiguous()
    side = _DRAW.tile["BLOCK_T"]
    tiles_x = cdiv(width, side)
    tiles = cdiv(height, side) * tiles_x
    queue = torch.empty(batch * tiles, _DRAW.tile["BLOCK_N"], dtype=torch.int32, device=mu.device)
    for channel in range(0, channels, _GROUP):
        args = (g.shape, g.box, features, queue, image, n, channels, channel, height, width)
        drawn = min(_GROUP, channels - channel)
        arguments = (*args, tiles_x, tiles, g.limit)
        launch(splat2d_kernel, (batch * tiles,), _DRAW, wrap, arguments, CHANNELS=drawn)
    return image.to(mu.dtype)


def splat2d_backward(
    grad: Tensor,
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    cutoff: float,
    with_stats: bool,
    *,
    wrap: Wrap | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for a gradient of the image.

    Args:
        grad: (B, C, H, W).
        mu: (B, N, 2) as in :func:`splat2d`.
        chol: (B, N, 3).
        feat: (B, N, C).
        counts: (B,) int64 or None.
        cutoff: that of the forward pass.
        with_stats: also return the sums of magnitudes.
        wrap: as in :func:`splat2d`.

    Returns:
        Like mu, chol and feat, and (B, N, 2) or (B, 0, 2).
    """
    batch, n, channels = feat.shape
    moments = torch.empty(batch * n, 7, device=mu.device)
    d_feat = torch.empty(batch, n, channels, device=mu.device)
    height, width = grad.shape[2:]
    g = _prepare(mu.float(), chol.float(), counts, height, width, cutoff)
    tensors = (g.shape, g.box, feat.float().contiguous(), grad.float().contiguous())
    for channel in range(0, channels if batch * n else 0, _GROUP):
        sizes = (n, channels, channel, height, width, g.limit)
        flags = {"CHANNELS": min(_GROUP, channels - channel), "MOMENTS": channel == 0}
        arguments = (*tensors, moments, d_feat, *sizes)
        launch(splat2d_backward_kernel, (batch * n,), _DIFFERENTIATE, wrap, arguments, **flags)
    return _finish(g.shape.view(batch, n, 5), moments.view(batch, n, 7), d_feat, mu, with_stats)


def _finish(
    shape: Tensor, moments: Tensor, d_feat: Tensor, mu: Tensor, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients from the moments of the scaled u and v."""
    u, v, uu, uv, vv, a_x, a_y = (moments / _SCALE).unbind(-1)
    per_x, per_y = shape[..., 2] / _SCALE, shape[..., 3] / _SCALE  # 1 / l1 and 1 / l3
    skew = shape[..., 4]
    d_mu = torch.stack([(u - skew * v) * per_x, v * per_y], -1)
    along = (uu - skew * uv) * per_x, uv * per_y, vv * per_y
    d_chol = torch.stack(along, -1) / _SCALE
    stats = torch.stack([a_x * per_x, a_y * per_y], -1)
    kept = stats if with_stats else stats[:, :0].clone()
    results = (d_mu, d_chol, d_feat, kept)
    return tuple(t.to(mu.dtype) for t in results)  # type: ignore[return-value]


_POINTERS = {"box": "*i32", "queue": "*i32", "limit": "fp32"}
_TENSORS = ("shape", "feat", "image", "grad", "moments", "d_feat")


def _aot(kernel: object, config: Config, **flags: object) -> AotCase:
    constexprs = {**flags, **config.tile}
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    signature = {
        name: "constexpr"
        if name in constexprs
        else "*fp32"
        if name in _TENSORS
        else _POINTERS.get(name, "i32")
        for name in names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return kernel, signature, constexprs, {**options, "enable_fp_fusion": False}


#: What to compile ahead of time: (kernel, signature, constexprs, options).
AOT_CASES: list[AotCase] = [
    *(_aot(splat2d_kernel, _DRAW, CHANNELS=c) for c in (1, 2, 3, 4)),
    *(
        _aot(splat2d_backward_kernel, _DIFFERENTIATE, CHANNELS=c, MOMENTS=m)
        for c, m in ((1, True), (3, True), (4, True), (4, False))
    ),
]
