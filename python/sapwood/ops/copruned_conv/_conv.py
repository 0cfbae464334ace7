"""Convolution with masks over tiles and filter groups, for every sample its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops._autocast import autocast
from sapwood.ops.copruned_conv import _checks, _specs, _triton
from sapwood.ops.copruned_conv._checks import Options, Size
from sapwood.reference import copruned_conv as reference

_NAME = "copruned_conv2d"
#: On a GPU the host does not know how much is kept; above this expectation dense torch runs.
_GPU_DENSE_SHARE = 0.75

Masks = tuple[Tensor | None, Tensor | None, Tensor | None]


def _dense_why_not(
    x: Tensor, weight: Tensor, options: Options, masks: Masks, expected_keep: float | None
) -> str | None:
    if any(m is not None and m.is_floating_point() for m in masks):
        return None
    if x.device.type == "cpu":
        return "the CPU kernel counts what is kept and calls dense torch by itself"
    if expected_keep is None or expected_keep <= _GPU_DENSE_SHARE:
        return f"pays above expected_keep = {_GPU_DENSE_SHARE}, this is {expected_keep}"
    return None


def _hard_why_not(x: Tensor, weight: Tensor, options: Options, masks: Masks, *_: Any) -> str | None:
    if any(m is not None and m.is_floating_point() for m in masks):
        return "a floating (soft) mask is a product, and has a gradient everywhere"
    return None


_native = _backend.native(_NAME, _specs.copruned_conv2d)


def _native_why_not(x: Tensor, *rest: Any) -> str | None:
    return _hard_why_not(x, *rest) or _native.why_not(x)


def _triton_why_not(x: Tensor, weight: Tensor, options: Options, *rest: Any) -> str | None:
    return _hard_why_not(x, weight, options, *rest) or _triton.why_not(x, weight, options)


_BACKENDS = (
    _backend.Backend("dense", _dense_why_not, reference.copruned_conv2d),
    _backend.Backend("native", _native_why_not, _specs.copruned_conv2d),
    _backend.Backend("triton", _triton_why_not, _triton.copruned_conv2d),
    _backend.Backend("reference", lambda *_: None, reference.copruned_conv2d),
)


def _options(
    op: str,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    tile: int,
    filter_group: int,
) -> Options:
    return Options(
        _checks.pair(op, "stride", stride),
        _checks.pair(op, "padding", padding),
        _checks.pair(op, "dilation", dilation),
        groups,
        tile,
        filter_group,
    )


def _explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    region_mask: Tensor | None = None,
    filter_mask: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    tile: int = 8,
    filter_group: int = 16,
    input_filter_mask: Tensor | None = None,
    expected_keep: float | None = None,
    **_: Any,
) -> _backend.Explanation:
    options = _options(_NAME, stride, padding, dilation, groups, tile, filter_group)
    masks = (region_mask, filter_mask, input_filter_mask)
    lines = _backend.candidates(_BACKENDS, input, weight, options, masks, expected_keep)
    return _backend.Explanation(_NAME, lines)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: Masks,
    residual: Tensor | None,
    options: Options,
    activation: str,
    expected_keep: float | None,
) -> Tensor:
    """The checked call. With gradients, an activation that needs its argument stands alone."""
    args = (x, weight, options, masks, expected_keep)
    chosen = _backend.choose(_NAME, _BACKENDS, *args)
    fused = chosen.name in ("native", "triton")  # the others are made of torch's own ops
    apart = residual is not None or activation not in ("none", "relu", "leaky_relu")
    if not (fused and apart and _wants_gradient(x, weight, bias, residual)):
        y: Tensor = chosen.run(x, weight, bias, *masks, residual, *options.args, activation)
        return y
    # All activations map 0 to 0, so that skipped outputs stay 0 (the masks are hard here).
    y = chosen.run(x, weight, bias, *masks, None, *options.args, "none")
    y = reference.ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


@_backend.explainable(_explain)
def copruned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    region_mask: Tensor | None = None,
    filter_mask: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    tile: int = 8,
    filter_group: int = 16,
    input_filter_mask: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    expected_keep: float | None = None,
) -> Tensor:
    """2-D convolution that computes, for each sample, only the tiles and filters its masks keep.

    Example::

        x, w = torch.randn(2, 32, 20, 20), torch.randn(64, 32, 3, 3)
        regions = torch.rand(2, 3, 3) < 0.3                  # tiles of 8 x 8 outputs
        filters = torch.rand(2, 4) < 0.5                     # groups of 16 filters
        y = sapwood.ops.copruned_conv2d(x, w, None, regions, filters, padding=1)

    A skipped tile or filter is exactly 0 before the residual is added, without bias; a tile reads
    the values of its neighbours, skipped or not. Of two convolutions in a row, the second saves
    once more when it gets the first one's ``filter_mask`` as ``input_filter_mask``.

    Args:
        input: (B, C, H, W) floating point; channels-last memory is used as it is, others are
            converted.
        weight: (K, C / groups, kh, kw) with kernel sides of 1, 3, 5 or 7.
        bias: (K,) or None.
        region_mask: (B, ceil(Ho / tile), ceil(Wo / tile)), True computes the tile. Bool, or
            floating (soft): then the convolution is dense and multiplied, with gradients to the
            masks. None computes all.
        filter_mask: (B, K / filter_group), likewise for groups of filters.
        stride: 1 or 2, or one for rows and one for columns; so are the next two.
        padding: zeros around the image, up to dilation * (kernel - 1).
        dilation: 1, 2 or 3.
        groups: 1, or C for a depthwise convolution with K = C.
        tile: side of a tile in output pixels: 2, 4, 8 or 16.
        filter_group: filters of a group: 8, 16, 32 or 64.
        input_filter_mask: (B, C / filter_group): input channels that count as zero.
        activation: "none", "relu", "gelu", "silu" or "leaky_relu" (slope 0.2).
        residual: (B, K, Ho, Wo), added last, everywhere.
        expected_keep: share of the work that masks keep, if known. On a GPU the count stays on the
            device, so this decides when dense torch is the faster way; the CPU counts.

    Returns:
        (B, K, Ho, Wo) in channels-last memory, dtype of ``input``; under autocast the autocast
        dtype, as ``F.conv2d``.

    Raises:
        ValueError: for shapes that do not match, an unknown tile, group or activation.
        TypeError: for non-tensors and other dtypes.
        NotImplementedError: for kernel, stride, dilation, padding or groups other than above.
        RuntimeError: for tensors on different devices.

    References:
        SBNet (Ren et al., 2018) and LASNet (Han et al., 2022) skip tiles; Dyna-Pruner (arXiv
        2606.15346) combines regions and filters of each sample. Grouping the filters, and the
        kernels, are our design.
    """
    _check.tensor(_NAME, "input", input)
    _check.tensor(_NAME, "weight", weight)
    for name, value in (("bias", bias), ("residual", residual)):
        if value is not None:
            _check.tensor(_NAME, name, value)
    options = _options(_NAME, stride, padding, dilation, groups, tile, filter_group)
    x, w, b, r = autocast(input, weight, bias, residual)
    size = _checks.convolution(_NAME, x, w, options)
    filters = w.shape[0]
    _checks.vectors(_NAME, x, filters, size, b, r)
    _check.one_of(_NAME, "activation", activation, tuple(reference.ACTIVATIONS))
    masks = (region_mask, filter_mask, input_filter_mask)
    _checks.masks(_NAME, x.shape[0], size, filters, x.shape[1], options, masks)
    _check.same_device(
        _NAME,
        input=x,
        weight=w,
        bias=b,
        region_mask=region_mask,
        filter_mask=filter_mask,
        input_filter_mask=input_filter_mask,
        residual=r,
    )
    return run(x, w, b, masks, r, options, activation, expected_keep)


def copruned_depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    region_mask: Tensor | None = None,
    filter_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`copruned_conv2d` with one filter per input channel.

    Example::

        x, w = torch.randn(2, 32, 20, 20), torch.randn(32, 1, 7, 7)
        y = sapwood.ops.copruned_depthwise_conv2d(x, w, None, torch.rand(2, 3, 3) < 0.3, padding=3)

    Args:
        input: (B, C, H, W).
        weight: (C, 1, kh, kw).
        bias: (C,) or None.
        region_mask: (B, ceil(Ho / tile), ceil(Wo / tile)) or None.
        filter_mask: (B, C / filter_group) or None.
        **options: the keyword arguments of :func:`copruned_conv2d` but ``groups``.

    Returns:
        (B, C, Ho, Wo) in channels-last memory.
    """
    _check.tensor(_NAME, "input", input)
    _check.dims(_NAME, "input", input, 4)
    groups = input.shape[1]
    return copruned_conv2d(input, weight, bias, region_mask, filter_mask, groups=groups, **options)
