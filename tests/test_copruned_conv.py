"""The copruned_conv family: samples of every op, and the battery over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops
from sapwood.reference import copruned_conv as reference
from tests.check_op import (
    DifferentiableBattery,
    Sample,
    TraceableBattery,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)

MAIN = frozenset({"main"})


def arguments(
    batch: int = 2,
    channels: int = 16,
    filters: int = 16,
    size: tuple[int, int] = (11, 9),
    kernel: tuple[int, int] = (3, 3),
    *,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    depthwise: bool = False,
    tile: int = 4,
    group: int = 8,
    regions: float | None = 0.5,
    groups_on: float | None = 0.6,
    inputs_on: float | None = None,
    bias: bool = True,
    residual: bool = False,
    activation: str = "none",
) -> tuple[Any, ...]:
    """Arguments of copruned_conv2d with random masks; a share of None leaves that mask out."""
    g = torch.Generator().manual_seed(batch + 10 * channels + 100 * sum(size) + 7 * tile)
    shape = [[stride] * 2, [padding] * 2, [dilation] * 2]
    out = reference.output_size(size, kernel, *shape)

    def mask(share: float | None, *sizes: int) -> Tensor | None:
        return None if share is None else torch.rand(sizes, generator=g) < share

    return (
        torch.randn(batch, channels, *size, generator=g),
        torch.randn(filters, 1 if depthwise else channels, *kernel, generator=g),
        torch.randn(filters, generator=g) if bias else None,
        mask(regions, batch, *(-(-n // tile) for n in out)),
        mask(groups_on, batch, filters // group),
        mask(inputs_on, batch, channels // group),
        torch.randn(batch, filters, *out, generator=g) if residual else None,
        *shape,
        channels if depthwise else 1,
        tile,
        group,
        activation,
    )


SMALL = {"batch": 1, "channels": 2, "filters": 8, "size": (4, 4), "tile": 2, "padding": 0}
FORWARD: list[tuple[str, dict[str, Any], tuple[int, ...], frozenset[str]]] = [
    ("main", {"inputs_on": 0.6}, (0, 1, 2), MAIN),
    ("1x1", {**SMALL, "kernel": (1, 1)}, (0, 1, 2), frozenset()),
    ("3x1-relu", {**SMALL, "kernel": (3, 1), "activation": "relu"}, (0, 1, 2), frozenset()),
    ("gelu", {**SMALL, "kernel": (1, 3), "activation": "gelu"}, (0, 1, 2), frozenset()),
    (
        "silu-residual",
        {**SMALL, "size": (3, 3), "kernel": (1, 3), "activation": "silu", "residual": True},
        (0, 1, 2, 6),
        frozenset(),
    ),
    (
        "leaky-stride",
        {
            **SMALL,
            "channels": 1,
            "size": (5, 4),
            "stride": 2,
            "padding": 1,
            "activation": "leaky_relu",
        },
        (0, 1, 2),
        frozenset(),
    ),
    (
        "depthwise",
        {**SMALL, "channels": 8, "size": (2, 2), "padding": 1, "depthwise": True, "inputs_on": 0.7},
        (0, 1, 2),
        frozenset(),
    ),
    (
        "7x7-dilated",
        {"kernel": (7, 7), "padding": 9, "dilation": 3, "bias": False},
        (0, 1),
        frozenset(),
    ),
    (
        "5x5-stride",
        {"kernel": (5, 5), "padding": 2, "stride": 2, "tile": 2},
        (0, 1, 2),
        frozenset(),
    ),
    ("48-filters", {"filters": 48, "channels": 48, "group": 16, "tile": 8}, (0, 1, 2), frozenset()),
    ("tile-16", {"tile": 16, "size": (37, 20), "residual": True}, (0, 1, 2, 6), frozenset()),
    ("depthwise-7x7", {"depthwise": True, "kernel": (7, 7), "padding": 3}, (0, 1, 2), frozenset()),
    ("none-kept", {"regions": 0.0}, (0, 1, 2), frozenset()),
    ("no-filter", {"groups_on": 0.0, "residual": True}, (0, 1, 2, 6), frozenset()),
    ("no-input", {"inputs_on": 0.0, "activation": "gelu"}, (0, 1, 2), frozenset()),
    ("one-pixel", {"size": (1, 1), "batch": 1}, (0, 1, 2), frozenset()),
    ("no-sample", {"batch": 0}, (0, 1, 2), frozenset()),
    ("no-output", {"size": (2, 9), "stride": 2, "padding": 0}, (0, 1, 2), frozenset()),
]


class ConvBattery(DifferentiableBattery):
    name = "copruned_conv2d"
    vmappable = (0, 1, 2, 6)

    def reduction(self, args: tuple[Any, ...]) -> int:
        return 2 + math.prod(args[1].shape[1:])

    def has_expected_layout(self, result: Tensor) -> bool:
        return result.is_contiguous(memory_format=torch.channels_last)


class TestCoprunedConv2d(ConvBattery):
    samples = tuple(
        Sample(name, arguments(**kwargs), grad, tags) for name, kwargs, grad, tags in FORWARD
    )


class TestDenseDispatch(ConvBattery):
    bitwise = False
    samples = (
        Sample(
            "all",
            arguments(regions=None, groups_on=None, activation="relu", residual=True),
            (0, 1, 2, 6),
            MAIN,
        ),
        Sample(
            "most",
            arguments(regions=0.99, groups_on=None, size=(25, 30), tile=2),
            (0, 1, 2),
        ),
        Sample("one-pixel-map", arguments(regions=None, groups_on=None, size=(1, 1)), (0, 1, 2)),
        Sample(
            "small",
            arguments(**{**SMALL, "kernel": (1, 1), "regions": None, "groups_on": None}),
            (0, 1, 2),
        ),
    )


def backward_sample(name: str, tags: frozenset[str] = frozenset(), **kwargs: Any) -> Sample:
    x, weight, _, region, filters, input_filters, _, *options, _ = arguments(**kwargs)
    stride, padding, dilation = options[:3]
    size = reference.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    grad = torch.randn(len(x), len(weight), *size, generator=torch.Generator().manual_seed(1))
    masks = (region, filters, input_filters)
    return Sample(name, (grad, x, weight, *masks, *options, True, True, True), (0, 1, 2), tags)


class TestCoprunedConv2dBackward(DifferentiableBattery):
    name = "copruned_conv2d_backward"
    vmappable = (0, 1)
    samples = (
        backward_sample("main", MAIN, inputs_on=0.6),
        backward_sample("1x1", **{**SMALL, "size": (3, 3), "kernel": (1, 1)}),
        backward_sample("3x1", **{**SMALL, "size": (3, 2), "kernel": (3, 1)}),
        backward_sample(
            "stride", **{**SMALL, "channels": 1, "stride": 2, "padding": 1, "size": (5, 3)}
        ),
        backward_sample(
            "2x2-tiles", **{**SMALL, "channels": 1, "size": (3, 3), "padding": 1, "kernel": (1, 3)}
        ),
        backward_sample("dilated", dilation=2, padding=2, kernel=(5, 5), tile=2),
        backward_sample("stride-5x5", stride=2, padding=2, kernel=(5, 5), size=(13, 8)),
        backward_sample("depthwise", depthwise=True, kernel=(5, 5), padding=2, inputs_on=0.7),
        backward_sample("depthwise-stride", depthwise=True, stride=2, size=(9, 12)),
        backward_sample("48-filters", filters=48, channels=48, group=16, tile=8, inputs_on=0.5),
        backward_sample("all", regions=None, groups_on=None),
        backward_sample("none-kept", regions=0.0),
        backward_sample("no-sample", batch=0),
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        grad, _, weight = args[:3]
        return max(int(grad[:, :1].numel()), int(weight[:, :1].numel()))

    def has_expected_layout(self, result: Tensor) -> bool:
        channels_last = torch.channels_last
        in_last = result.dim() == 4 and result.is_contiguous(memory_format=channels_last)
        return in_last or result.is_contiguous()


class TestTileList(TraceableBattery):
    name = "tile_list"
    exact = True
    samples = tuple(
        Sample(
            f"{shape}-{share}",
            (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < share,),
            tags=tags,
        )
        for shape, share, tags in (
            ((3, 5, 7), 0.4, MAIN),
            ((2, 70, 9), 0.5, frozenset()),
            ((1,), 1.1, frozenset()),
            ((4, 3), 0.0, frozenset()),
            ((0, 3, 3), 0.5, frozenset()),
            ((), 1.1, frozenset()),
        )
    )
