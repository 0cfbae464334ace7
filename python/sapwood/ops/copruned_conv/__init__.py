"""Convolutions that compute only the tiles and filter groups that the masks of a sample keep.

:func:`copruned_conv2d` and :func:`copruned_depthwise_conv2d`; :func:`copruned_conv_lstm_step` for a
recurrent cell; :func:`tile_mask` and :func:`dilate_tile_mask` make masks, :func:`copruned_flops`
counts what is left, :func:`tile_list` compacts a mask without leaving the device.
"""

from sapwood.ops.copruned_conv._conv import copruned_conv2d, copruned_depthwise_conv2d
from sapwood.ops.copruned_conv._lstm import copruned_conv_lstm_step
from sapwood.ops.copruned_conv._masks import (
    copruned_flops,
    dilate_tile_mask,
    tile_list,
    tile_mask,
)

__all__ = [
    "copruned_conv2d",
    "copruned_conv_lstm_step",
    "copruned_depthwise_conv2d",
    "copruned_flops",
    "dilate_tile_mask",
    "tile_list",
    "tile_mask",
]
