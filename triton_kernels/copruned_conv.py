"""Triton launcher of copruned_conv: kept tiles times kept filter groups of every sample.

The lists of what is kept are made on the device by stable sorts of the masks, and have room for all
tiles, so that nothing waits for their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._copruned_conv_kernels import copruned_conv_kernel
from ._launch import AotCase, Config, Wrap, cdiv, launch

__all__ = ["AOT_CASES", "copruned_conv2d"]

ACTIVATIONS = ("none", "relu", "gelu", "silu", "leaky_relu")
_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
#: By bytes per element; chosen by hand, not yet timed on a device.
_CONFIG: dict[int, Config] = {
    2: Config(dict(zip(_TILE, (64, 64, 32), strict=True)), 4, 3),
    4: Config(dict(zip(_TILE, (64, 32, 32), strict=True)), 4, 2),
}


def _kept(mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) bool -> numbers with those that are on first, in order; and how many are on."""
    if mask is None:
        nothing = torch.empty(0, dtype=torch.int64, device=like.device)
        return nothing, nothing
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order.contiguous(), mask.sum(1)


def copruned_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    filters: Tensor | None,
    input_filters: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
    filter_group: int,
    activation: str,
    *,
    wrap: Wrap | None = None,
) -> Tensor:
    """The op ``copruned_conv2d`` for groups = 1.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16.
        weight: (K, C, kh, kw).
        bias: (K,) or None.
        region: (B, tile rows, tile columns) bool or None.
        filters: (B, K / filter_group) bool or None.
        input_filters: (B, C / filter_group) bool or None.
        residual: (B, K, Ho, Wo) or None.
        stride: rows, columns; likewise the next two.
        padding: zeros around the image.
        dilation: distance of taps.
        tile: side of a tile.
        filter_group: filters of a group.
        activation: one of ``ACTIVATIONS``.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, K, Ho, Wo) in channels-last memory.
    """
    last = torch.channels_last
    batch, channels, rows, cols = x.shape
    count, _, height, width = weight.shape
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            (rows, cols), (height, width), stride, padding, dilation, strict=True
        )
    ]
    shape = (batch, count, *out)
    x = x.contiguous(memory_format=last)
    if residual is None:
        y = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=last)
    else:
        residual = residual.contiguous(memory_format=last)
        y = residual.clone(memory_format=last)
    tiles = [cdiv(n, tile) for n in out]
    config = _CONFIG[x.element_size()]
    blocks = cdiv(tiles[0] * tiles[1] * tile * tile, config.tile["BLOCK_M"])
    grid = (batch * blocks * cdiv(count, config.tile["BLOCK_N"]),)
    if not y.numel():
        return y
    lists: list[Tensor] = []
    for mask in (region, filters, input_filters):
        lists.extend(_kept(None if mask is None else mask.flatten(1), x))
    tensors = (x, weight, x if bias is None else bias.contiguous())
    sizes = (rows, cols, channels, *out, count, tiles[1], tiles[0] * tiles[1])
    arguments = (*tensors, y if residual is None else residual, y, *lists, *sizes)
    steps = (*weight.stride(), *stride, *padding, *dilation)
    constants = {
        "ROWS": height,
        "COLS": width,
        "TILE": tile,
        "GROUP": filter_group,
        "ACTIVATION": ACTIVATIONS.index(activation),
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_REGION": region is not None,
        "HAS_FILTERS": filters is not None,
        "HAS_INPUTS": input_filters is not None,
    }
    launch(copruned_conv_kernel, grid, config, wrap, (*arguments, *steps), **constants)
    return y


def _aot(dtype: str, config: Config, **flags: Any) -> AotCase:
    constants = {
        **{"ROWS": 3, "COLS": 3, "TILE": 8, "GROUP": 16, "ACTIVATION": 0, "HAS_BIAS": True},
        **{"HAS_RESIDUAL": False, "HAS_REGION": True, "HAS_FILTERS": False, "HAS_INPUTS": False},
        **flags,
        **config.tile,
    }
    floats, lists = ("x", "weight", "bias", "residual", "y"), ("items", "filter_groups")
    lists += ("item_counts", "filter_counts", "input_groups", "input_counts")
    types = {**dict.fromkeys(floats, dtype), **dict.fromkeys(lists, "*i64")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in copruned_conv_kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return copruned_conv_kernel, signature, constants, {**options, "enable_fp_fusion": False}


#: What to compile ahead of time: (kernel, signature, constexprs, options).
AOT_CASES: list[AotCase] = [
    _aot("*fp32", _CONFIG[4]),
    _aot("*fp16", _CONFIG[2], HAS_FILTERS=True, HAS_INPUTS=True, ACTIVATION=2),
    _aot("*bf16", _CONFIG[2], HAS_FILTERS=True, HAS_RESIDUAL=True, ACTIVATION=3, TILE=4),
]
