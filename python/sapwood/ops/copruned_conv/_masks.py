"""Masks over tiles: made from scores, widened by a halo, counted, and listed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _check
from sapwood.ops.copruned_conv import _checks, _specs


def tile_mask(score: Tensor, *, threshold: float = 0.5, keep: float | None = None) -> Tensor:
    """Tiles whose score is above a threshold, or the best ones of every sample.

    Example::

        mask = sapwood.ops.tile_mask(torch.rand(4, 7, 7), keep=0.3)     # 15 of 49 tiles each

    Args:
        score: (*, rows, columns) floating point; NaN is never kept.
        threshold: scores above it are kept, unless ``keep`` is given.
        keep: share of the tiles of every sample to keep, 0 to 1; the number is rounded to the
            nearest, of equal scores the first tiles in raster order are kept.

    Returns:
        (*, rows, columns) bool.

    Raises:
        ValueError: for a share outside of 0 to 1, or fewer than 2 dimensions.
        TypeError: for non-tensors and other dtypes.
    """
    op = "tile_mask"
    _check.tensor(op, "score", score)
    _check.floating(op, "score", score)
    if score.dim() < 2:
        expectation = "have at least 2 dimensions"
        _check.fail(ValueError, op, "score", expectation, f"shape {tuple(score.shape)}")
    if keep is None:
        return score > threshold
    if not 0 <= keep <= 1:
        _check.fail(ValueError, op, "keep", "lie in 0 to 1", keep)
    flat = torch.where(score.isnan(), -torch.inf, score).flatten(-2)
    best = flat.argsort(dim=-1, descending=True, stable=True)[..., : round(keep * flat.shape[-1])]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, best, True)
    return chosen.view(score.shape) & ~score.isnan()


def dilate_tile_mask(mask: Tensor, *, halo: int, tile: int) -> Tensor:
    """Adds the tiles from which a kept one is at most ``halo`` pixels away.

    Example::

        wider = sapwood.ops.dilate_tile_mask(torch.rand(4, 7, 7) < 0.2, halo=1, tile=8)

    Args:
        mask: (*, rows, columns) bool.
        halo: pixels, as dilation * (kernel - 1) / 2 of a convolution.
        tile: side of a tile in pixels.

    Returns:
        (*, rows, columns) bool.

    Raises:
        ValueError: for a negative halo, a tile below 1, or fewer than 2 dimensions.
        TypeError: for masks that are not bool.
    """
    op = "dilate_tile_mask"
    _check.tensor(op, "mask", mask)
    _check.dtype(op, "mask", mask, (torch.bool,))
    if mask.dim() < 2:
        expectation = "have at least 2 dimensions"
        _check.fail(ValueError, op, "mask", expectation, f"shape {tuple(mask.shape)}")
    if halo < 0:
        _check.fail(ValueError, op, "halo", "be at least 0", halo)
    if tile < 1:
        _check.fail(ValueError, op, "tile", "be at least 1", tile)
    reach = -(-halo // tile)
    if reach == 0 or not mask.numel():
        return mask.clone()
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return F.max_pool2d(flat, 2 * reach + 1, 1, reach).bool().view(mask.shape)


def copruned_flops(
    weight_shape: Sequence[int],
    output_shape: Sequence[int],
    region_mask: Tensor | None = None,
    filter_mask: Tensor | None = None,
    input_filter_mask: Tensor | None = None,
    *,
    groups: int = 1,
    tile: int = 8,
    filter_group: int = 16,
) -> Tensor:
    """Multiplications of every sample of a :func:`copruned_conv2d`, counted on the masks' device.

    Example::

        mask = torch.rand(2, 3, 3) < 0.3
        macs = sapwood.ops.copruned_flops((64, 32, 3, 3), (2, 64, 20, 20), mask)

    Multiplications with padding zeros count, as in the usual figures of dense convolutions. One
    multiplication with its addition is one MAC, or two floating-point operations.

    Args:
        weight_shape: (K, C / groups, kh, kw).
        output_shape: (B, K, Ho, Wo).
        region_mask: (B, ceil(Ho / tile), ceil(Wo / tile)) bool or None.
        filter_mask: (B, K / filter_group) bool or None.
        input_filter_mask: (B, C / filter_group) bool or None.
        groups: 1, or C for a depthwise convolution.
        tile: side of a tile in output pixels.
        filter_group: filters of a group.

    Returns:
        (B,) int64.

    Raises:
        ValueError: for masks whose shapes do not match.
        TypeError: for masks that are not bool.
    """
    op = "copruned_flops"
    filters, per_group, *kernel = weight_shape
    batch, _, rows, cols = output_shape
    masks = (region_mask, filter_mask, input_filter_mask)
    for name, mask in zip(("region_mask", "filter_mask", "input_filter_mask"), masks, strict=True):
        if mask is not None:
            _check.tensor(op, name, mask)
            _check.dtype(op, name, mask, (torch.bool,))
    options = _checks.Options([1, 1], [0, 0], [1, 1], groups, tile, filter_group)
    channels = per_group * groups
    _checks.masks(op, batch, (rows, cols), filters, channels, options, masks)
    device = next((m.device for m in masks if m is not None), None)
    every = torch.full((batch,), 1, dtype=torch.int64, device=device)
    pixels, kept, inputs = every * (rows * cols), every * filters, every * per_group
    if region_mask is not None:
        sides = (
            (n - tile * torch.arange(-(-n // tile), device=device)).clamp_max(tile)
            for n in (rows, cols)
        )
        tall, wide = sides
        pixels = (region_mask * tall[:, None] * wide).sum((1, 2))
    if groups != 1:  # a depthwise filter works when both of its groups are on
        both = [m for m in (filter_mask, input_filter_mask) if m is not None]
        if both:
            kept = torch.stack(both).all(0).sum(1) * filter_group
    else:
        if filter_mask is not None:
            kept = filter_mask.sum(1) * filter_group
        if input_filter_mask is not None:
            inputs = input_filter_mask.sum(1) * filter_group
    return pixels * kept * inputs * (kernel[0] * kernel[1])


def tile_list(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the entries that are on, without waiting for the device.

    Example::

        items, count = sapwood.ops.tile_list(torch.rand(4, 7, 7) < 0.3)

    Args:
        mask: bool of any shape with fewer than 2^31 entries.

    Returns:
        items (mask.numel(),) int32, ascending numbers in row-major order and then -1, so that its
        size does not depend on the values; count () int32.

    Raises:
        TypeError: for masks that are not bool.
    """
    op = "tile_list"
    _check.tensor(op, "mask", mask)
    _check.dtype(op, "mask", mask, (torch.bool,))
    items, count = _specs.tile_list(mask)
    return items, count
