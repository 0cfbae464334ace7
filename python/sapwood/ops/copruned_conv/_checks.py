"""What the functions of the family check: pairs of sizes, masks, what has a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood import _check
from sapwood.reference import copruned_conv as reference

TILES = (2, 4, 8, 16)
FILTER_GROUPS = (8, 16, 32, 64)
_KERNELS, _STRIDES, _DILATIONS = (1, 3, 5, 7), (1, 2), (1, 2, 3)
_ELSEWHERE = "sapwood.reference.copruned_conv.copruned_conv2d takes others"

Size = int | Sequence[int]


@dataclass(frozen=True)
class Options:
    """Sizes of a call, in the order of the op's schema; lists, as its schema wants them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    tile: int
    filter_group: int

    @property
    def args(self) -> tuple[list[int], list[int], list[int], int, int, int]:
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.tile,
            self.filter_group,
        )


def pair(op: str, argument: str, value: Size) -> list[int]:
    """An int or two of them as two."""
    sizes = [value, value] if isinstance(value, int) else [int(v) for v in value]
    if len(sizes) != 2:
        _check.fail(ValueError, op, argument, "be an int or two ints", value)
    return sizes


def choice(op: str, argument: str, value: int, allowed: Sequence[int]) -> None:
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        _check.fail(ValueError, op, argument, f"be one of {names}", value)


def _kernel_for(op: str, argument: str, values: Sequence[int], allowed: Sequence[int]) -> None:
    if any(v not in allowed for v in values):
        names = ", ".join(map(str, allowed))
        expectation = f"be of {names} ({_ELSEWHERE})"
        _check.fail(NotImplementedError, op, argument, expectation, tuple(values))


def convolution(op: str, x: Tensor, weight: Tensor, options: Options) -> tuple[int, int]:
    """Checks everything but masks; returns rows and columns of the output."""
    _check.dims(op, "input", x, 4)
    _check.dims(op, "weight", weight, 4)
    _check.floating(op, "input", x)
    _check.same_dtype(op, "weight", weight, "input", x)
    channels, filters, kernel = x.shape[1], weight.shape[0], tuple(weight.shape[2:])
    choice(op, "tile", options.tile, TILES)
    choice(op, "filter_group", options.filter_group, FILTER_GROUPS)
    if options.groups != 1 and not options.groups == channels == filters:
        expectation = f"be 1 or the number of channels and filters ({_ELSEWHERE})"
        _check.fail(NotImplementedError, op, "groups", expectation, options.groups)
    _check.shape(op, "weight", weight, (filters, channels // options.groups, *kernel))
    _kernel_for(op, "weight's kernel", kernel, _KERNELS)
    _kernel_for(op, "stride", options.stride, _STRIDES)
    _kernel_for(op, "dilation", options.dilation, _DILATIONS)
    for padding, d, k in zip(options.padding, options.dilation, kernel, strict=True):
        if not 0 <= padding <= d * (k - 1):
            expectation = f"be of 0 to dilation * (kernel - 1) = {d * (k - 1)} ({_ELSEWHERE})"
            got = tuple(options.padding)
            _check.fail(NotImplementedError, op, "padding", expectation, got)
    shape = (options.stride, options.padding, options.dilation)
    rows, cols = reference.output_size(x.shape[2:], kernel, *shape)
    if not (rows and cols):
        expectation = f"be at least as large as the kernel {kernel} after padding"
        _check.fail(ValueError, op, "input", expectation, tuple(x.shape[2:]))
    return rows, cols


def vectors(
    op: str,
    x: Tensor,
    filters: int,
    size: tuple[int, int],
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Checks what is added to the sums."""
    for name, value, shape in (
        ("bias", bias, (filters,)),
        ("residual", residual, (x.shape[0], filters, *size)),
    ):
        if value is not None:
            _check.shape(op, name, value, shape)
            _check.same_dtype(op, name, value, "input", x)


def mask(op: str, argument: str, value: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """A bool or floating mask of this shape, which `what` explains."""
    if value is None:
        return
    _check.tensor(op, argument, value)
    if value.dtype != torch.bool and not value.is_floating_point():
        _check.fail(TypeError, op, argument, "be bool or floating point", value.dtype)
    if value.shape != shape:
        got = tuple(value.shape)
        _check.fail(ValueError, op, argument, f"have shape {shape} ({what})", got)


def group_count(op: str, argument: str, mask: Tensor | None, channels: int, group: int) -> int:
    """Groups of a mask over channels; they must divide evenly where there is a mask."""
    if mask is not None and channels % group:
        owner = "filters" if argument == "filter_mask" else "input channels"
        _check.fail(ValueError, op, "filter_group", f"divide the {channels} {owner}", group)
    return channels // group


def masks(
    op: str,
    batch: int,
    size: tuple[int, int],
    filters: int,
    channels: int,
    options: Options,
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Checks region, filter and input filter masks against sizes."""
    region, filter_mask, input_filter_mask = given
    tiles = tuple(-(-n // options.tile) for n in size)
    what = f"batch and the grid of {options.tile} x {options.tile} tiles over {size} outputs"
    mask(op, "region_mask", region, (batch, *tiles), what)
    for name, value, count in (
        ("filter_mask", filter_mask, filters),
        ("input_filter_mask", input_filter_mask, channels),
    ):
        groups = group_count(op, name, value, count, options.filter_group)
        mask(op, name, value, (batch, groups), f"batch and groups of {options.filter_group}")
