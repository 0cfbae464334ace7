"""One step of a convolutional LSTM whose skipped tiles and units keep their state."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood import _check
from sapwood.ops._autocast import autocast
from sapwood.ops.copruned_conv import _checks, _conv
from sapwood.ops.copruned_conv._checks import Options
from sapwood.reference import copruned_conv as reference

_NAME = "copruned_conv_lstm_step"
_GATES = 4  # i, f, g, o


def _checked(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    options: Options,
) -> None:
    for name, value in (("x", x), ("h", h), ("weight_x", weight_x), ("weight_h", weight_h)):
        _check.dims(_NAME, name, value, 4)
    size = _checks.convolution(_NAME, x, weight_x, options)
    gates, kernel = weight_x.shape[0], tuple(weight_x.shape[2:])
    if gates % _GATES:
        _check.fail(ValueError, _NAME, "weight_x", "have 4 gates' filters", gates)
    units = gates // _GATES
    state = (x.shape[0], units, *size)
    for name, value in (("h", h), ("c", c)):
        _check.shape(_NAME, name, value, state)
        _check.same_dtype(_NAME, name, value, "x", x)
    _check.shape(_NAME, "weight_h", weight_h, (gates, units, *kernel))
    _check.same_dtype(_NAME, "weight_h", weight_h, "x", x)
    _checks.vectors(_NAME, x, gates, size, bias, None)


def copruned_conv_lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor | None = None,
    region_mask: Tensor | None = None,
    filter_mask: Tensor | None = None,
    *,
    tile: int = 8,
    filter_group: int = 16,
) -> tuple[Tensor, Tensor]:
    """A ConvLSTM step that computes only the tiles and hidden units the masks keep.

    Example::

        x, h, c = (torch.randn(2, 16, 20, 20) for _ in range(3))
        w_x, w_h = (torch.randn(64, 16, 3, 3) for _ in range(2))
        mask = torch.rand(2, 3, 3) < 0.3
        h, c = sapwood.ops.copruned_conv_lstm_step(x, h, c, w_x, w_h, None, mask)

    With i, f, g, o from ``conv(x, weight_x) + conv(h, weight_h) + bias``:
    ``c' = sigmoid(f) c + sigmoid(i) tanh(g)`` and ``h' = sigmoid(o) tanh(c')``; where a mask is
    off, h and c are copied bit for bit.

    Args:
        x: (B, C, H, W) floating point.
        h: (B, D, H, W) hidden state.
        c: (B, D, H, W) cell state.
        weight_x: (4 D, C, k, k) with odd k, gates in the order i, f, g, o.
        weight_h: (4 D, D, k, k).
        bias: (4 D,) or None.
        region_mask: (B, ceil(H / tile), ceil(W / tile)) bool, floating (soft: old and new state
            are mixed, with gradients to the mask), or None for all.
        filter_mask: (B, D / filter_group), likewise: hidden units, all four gates together.
        tile: side of a tile: 2, 4, 8 or 16.
        filter_group: hidden units of a group: 8, 16, 32 or 64.

    Returns:
        h and c after the step, (B, D, H, W) each, new tensors in channels-last memory.

    Raises:
        ValueError: for shapes that do not match.
        TypeError: for non-tensors and other dtypes.
        NotImplementedError: for kernels other than 1, 3, 5 and 7.
        RuntimeError: for tensors on different devices.

    References:
        Shi et al., "Convolutional LSTM Network", 2015, without the peephole terms; skipping is the
        copy of Dyna-Pruner's recurrent backbone (arXiv 2606.15346) as we implement it.
    """
    given = {"x": x, "h": h, "c": c, "weight_x": weight_x, "weight_h": weight_h}
    for name, value in given.items():
        _check.tensor(_NAME, name, value)
    x, h, c, weight_x, weight_h, bias = autocast(x, h, c, weight_x, weight_h, bias)
    _check.dims(_NAME, "weight_x", weight_x, 4)
    half = [side // 2 for side in weight_x.shape[2:]]
    options = Options([1, 1], half, [1, 1], 1, tile, filter_group)
    _checked(x, h, c, weight_x, weight_h, bias, options)
    batch, units, size = x.shape[0], h.shape[1], (x.shape[2], x.shape[3])
    _checks.masks(_NAME, batch, size, units, units, options, (region_mask, filter_mask, None))
    _check.same_device(
        _NAME,
        x=x,
        h=h,
        c=c,
        weight_x=weight_x,
        weight_h=weight_h,
        bias=bias,
        region_mask=region_mask,
        filter_mask=filter_mask,
    )
    region, units_on = (_hard(m) for m in (region_mask, filter_mask))
    gates_on = None if units_on is None else units_on.repeat(1, _GATES)
    masks = (region, gates_on, None)
    gates = _conv.run(x, weight_x, bias, masks, None, options, "none", None)
    gates = _conv.run(h, weight_h, None, masks, gates, options, "none", None)
    i, f, g, o = gates.chunk(_GATES, 1)
    c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h_new = o.sigmoid() * c_new.tanh()
    for mask in (
        reference.over_pixels(region_mask, tile, *size),
        reference.over_channels(filter_mask, filter_group),
    ):
        h_new = reference.keep_where_off(mask, h_new, h)
        c_new = reference.keep_where_off(mask, c_new, c)
    channels_last = torch.channels_last
    return h_new.contiguous(memory_format=channels_last), c_new.contiguous(
        memory_format=channels_last
    )


def _hard(mask: Tensor | None) -> Tensor | None:
    """A soft mask mixes states that are both computed."""
    return mask if mask is not None and mask.dtype == torch.bool else None
