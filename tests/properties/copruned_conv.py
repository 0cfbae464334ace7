"""Arguments of the copruned_conv family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tests.test_copruned_conv as batteries
from sapwood.reference import copruned_conv as reference
from tests.properties.strategies import SIZES, Arguments, Property, Source


@dataclass(frozen=True)
class _Call:
    """Input, weight, masks, options and the size of the output."""

    x: Tensor
    weight: Tensor
    masks: tuple[Tensor | None, ...]
    options: tuple[Any, ...]
    size: tuple[int, int]


def _call(s: Source) -> _Call:
    side = (1, SIZES[-1])  # torch takes no empty image
    batch, rows, cols = s.sizes((0, 9), side, side, most=4225)
    kernel = s.pick(((1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 5), (7, 7)))
    stride, dilation, padding = s.pick((1, 1, 2)), s.pick((1, 1, 2)), s.pick((0, 1, 3))
    tile, group, is_depthwise = s.pick((1, 2, 4, 8)), s.pick((8, 16)), s.flag()
    groups_in = s.pick((1, 2, 4)) * group
    channels = groups_in if is_depthwise else s.pick((groups_in, groups_in, s.size(1)))
    filters = channels if is_depthwise else group * s.pick((1, 2, 4))
    shape = [[stride] * 2, [padding] * 2, [dilation] * 2]
    size = reference.output_size((rows, cols), kernel, *shape)
    masks = (
        s.mask(batch, *(-(-n // tile) for n in size)) if s.flag() else None,
        s.mask(batch, filters // group) if s.flag() else None,
        s.mask(batch, channels // group) if channels % group == 0 and s.flag() else None,
    )
    return _Call(
        s.normal(batch, channels, rows, cols),
        s.normal(filters, 1 if is_depthwise else channels, *kernel),
        masks,
        (*shape, channels if is_depthwise else 1, tile, group),
        size,
    )


def _convolution(s: Source) -> Arguments:
    c = _call(s)
    filters = len(c.weight)
    bias = s.normal(filters) if s.flag() else None
    residual = s.normal(len(c.x), filters, *c.size) if s.flag() else None
    activation = s.pick(tuple(reference.ACTIVATIONS))
    return c.x, c.weight, bias, *c.masks, residual, *c.options, activation


def _backward(s: Source) -> Arguments:
    c = _call(s)
    grad = s.normal(len(c.x), len(c.weight), *c.size)
    return grad, c.x, c.weight, *c.masks, *c.options, s.flag(), s.flag(), s.flag()


def _tiles(s: Source) -> Arguments:
    return (s.mask(*(s.size() for _ in range(s.pick((0, 1, 2, 3))))),)


PROPERTIES = {
    "copruned_conv2d": Property(batteries.TestCoprunedConv2d, _convolution),
    "copruned_conv2d_backward": Property(batteries.TestCoprunedConv2dBackward, _backward),
    "tile_list": Property(batteries.TestTileList, _tiles),
}
