"""Convolution whose regions and filters are chosen for every sample, in plain torch::

    x'[b, c]   = x[b, c] * input_filters[b, c // group]
    z          = activation(conv2d(x', W, bias))
    y[b, k, p] = z[b, k, p] * region[b, p_y // tile, p_x // tile] * filters[b, k // group]
                 + residual[b, k, p]

A skipped tile or filter is exactly 0 before the residual; a tile reads its neighbours' values,
skipped or not. Bool masks select, so that NaN does not leak; floating (soft) masks multiply and
have gradients. Functions named as an op of ``csrc/schema.cpp`` have its signature; any kernel size,
stride, dilation and padding will do here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAK = 0.2

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAK),
}


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Rows and columns of the output, as ``F.conv2d``; never negative."""
    rows, cols = (
        max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1)
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return rows, cols


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where a bool mask is on and else 0; the product with a floating one."""
    if mask is None:
        return x
    return torch.where(mask, x, 0.0) if mask.dtype == torch.bool else x * mask.to(x.dtype)


def over_channels(mask: Tensor | None, group: int) -> Tensor | None:
    """(B, groups) -> (B, channels, 1, 1)."""
    return None if mask is None else mask.repeat_interleave(group, 1)[:, :, None, None]


def over_pixels(region: Tensor | None, tile: int, rows: int, cols: int) -> Tensor | None:
    """(B, tile rows, tile columns) -> (B, 1, rows, cols)."""
    if region is None:
        return None
    wide = region.repeat_interleave(tile, 1)[:, :rows].repeat_interleave(tile, 2)[:, :, :cols]
    return wide[:, None]


def channels_last(x: Tensor) -> Tensor:
    """A copy in channels-last memory; in a form that vmap can take."""
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def copruned_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (K, C / groups, kh, kw)
    bias: Tensor | None = None,  # (K,)
    region: Tensor | None = None,  # (B, ceil(Ho / tile), ceil(Wo / tile))
    filters: Tensor | None = None,  # (B, K / filter_group)
    input_filters: Tensor | None = None,  # (B, C / filter_group)
    residual: Tensor | None = None,  # (B, K, Ho, Wo)
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    tile: int = 8,
    filter_group: int = 16,
    activation: str = "none",
) -> Tensor:  # (B, K, Ho, Wo) channels last
    x = apply_mask(x, over_channels(input_filters, filter_group))
    rows, cols = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if rows and cols and x.shape[0] and x.shape[1]:
        z = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    else:
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
        z = offset[:, None, None].expand(x.shape[0], weight.shape[0], rows, cols)
    y = ACTIVATIONS[activation](z)
    y = apply_mask(y, over_pixels(region, tile, rows, cols))
    y = apply_mask(y, over_channels(filters, filter_group))
    y = y if residual is None else y + residual
    return channels_last(y)


def copruned_conv2d_backward(
    grad: Tensor,  # (B, K, Ho, Wo)
    x: Tensor,
    weight: Tensor,
    region: Tensor | None,
    filters: Tensor | None,
    input_filters: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile: int,
    filter_group: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias without activation; of size 0 where not needed."""
    slope = apply_mask(grad, over_pixels(region, tile, grad.shape[2], grad.shape[3]))
    slope = apply_mask(slope, over_channels(filters, filter_group))
    inputs = over_channels(input_filters, filter_group)
    shape, wanted = (list(stride), list(padding), list(dilation)), (need_x, need_weight, False)
    gx, gw = x.new_empty(0), weight.new_empty(0)
    if slope.numel() and x.numel() and weight.numel() and (need_x or need_weight):
        found = torch.ops.aten.convolution_backward.default(
            slope, apply_mask(x, inputs), weight, None, *shape, False, [0, 0], groups, list(wanted)
        )
        gx, gw = (found[i] if wanted[i] else x.new_empty(0) for i in range(2))
    else:
        gx = x.new_zeros(x.shape) if need_x else gx
        gw = weight.new_zeros(weight.shape) if need_weight else gw
    if need_x:
        gx = channels_last(apply_mask(gx, inputs))
    gw = gw.contiguous()
    return gx, gw, slope.sum((0, 2, 3)) if need_bias else x.new_empty(0)


def tile_list(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the entries that are on, ascending and then -1; and how many there are."""
    on = mask.flatten().nonzero()[:, 0].int()
    items = torch.full((mask.numel(),), -1, dtype=torch.int32, device=mask.device)
    items[: len(on)] = on
    return items, torch.tensor(len(on), dtype=torch.int32, device=mask.device)


def copruned_conv_lstm_step(
    x: Tensor,  # (B, C, H, W)
    h: Tensor,  # (B, D, H, W)
    c: Tensor,  # (B, D, H, W)
    weight_x: Tensor,  # (4 D, C, k, k)
    weight_h: Tensor,  # (4 D, D, k, k)
    bias: Tensor | None,  # (4 D,)
    region: Tensor | None,  # (B, tile rows, tile columns)
    filters: Tensor | None = None,  # (B, D / filter_group)
    tile: int = 8,
    filter_group: int = 16,
) -> tuple[Tensor, Tensor]:
    """A ConvLSTM step (gates i, f, g, o) in which skipped tiles and units keep h and c."""
    half = [k // 2 for k in weight_x.shape[2:]]
    gates = F.conv2d(x, weight_x, bias, padding=half) + F.conv2d(h, weight_h, padding=half)
    i, f, g, o = gates.chunk(4, 1)
    c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h_new = o.sigmoid() * c_new.tanh()
    for mask in (over_pixels(region, tile, *x.shape[2:]), over_channels(filters, filter_group)):
        h_new, c_new = keep_where_off(mask, h_new, h), keep_where_off(mask, c_new, c)
    return h_new, c_new


def keep_where_off(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """new where the mask is on and old elsewhere; a mix of both for a soft mask."""
    if mask is None:
        return new
    if mask.dtype == torch.bool:
        return torch.where(mask, new, old)
    return old + mask.to(new.dtype) * (new - old)
