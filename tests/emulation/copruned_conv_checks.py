"""Checks of the device kernels of copruned_conv, shared by the emulation and by real devices.

Every check takes the namespace of ops (``torch.ops.sapwood_emu`` or ``torch.ops.sapwood``).
Expected values are plain torch in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.reference import copruned_conv as reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """Sizes and masks of one convolution; shares of None leave a mask out."""

    batch: int = 2
    channels: int = 24
    filters: int = 40
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False
    tile: int = 4
    group: int = 8
    regions: float | None = 0.5
    filters_on: float | None = 0.6
    inputs_on: float | None = 0.6
    residual: bool = False
    activation: str = "none"

    def mask(self, share: float | None, *shape: int, device: str) -> Tensor | None:
        if share is None:
            return None
        g = torch.Generator().manual_seed(sum(shape) + round(100 * share))
        return (torch.rand(shape, generator=g) < share).to(device)

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor | None, ...]:
        """x, weight, bias, region, filters, input filters, residual."""
        g = torch.Generator().manual_seed(self.batch + self.channels + self.tile)
        out = reference.output_size(
            self.size, self.kernel, self.stride, self.padding, self.dilation
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(device, dtype)

        inputs = 1 if self.depthwise else self.channels
        tiles = (-(-n // self.tile) for n in out)
        return (
            normal(self.batch, self.channels, *self.size),
            normal(self.filters, inputs, *self.kernel),
            normal(self.filters),
            self.mask(self.regions, self.batch, *tiles, device=device),
            self.mask(self.filters_on, self.batch, self.filters // self.group, device=device),
            self.mask(self.inputs_on, self.batch, self.channels // self.group, device=device),
            normal(self.batch, self.filters, *out) if self.residual else None,
        )

    @property
    def options(self) -> tuple[Any, ...]:
        groups = self.channels if self.depthwise else 1
        shape = (list(self.stride), list(self.padding), list(self.dilation))
        return (*shape, groups, self.tile, self.group)


PROBLEMS = {
    "main": Problem(residual=True, activation="gelu"),
    "all": Problem(regions=None, filters_on=None, inputs_on=None, activation="relu"),
    "none": Problem(regions=0.0),
    "no-filter": Problem(filters_on=0.0, residual=True),
    "no-input": Problem(inputs_on=0.0, activation="silu"),
    "stride": Problem(stride=(2, 2), size=(11, 14), kernel=(5, 5), padding=(2, 2)),
    "mixed-stride": Problem(stride=(1, 2), size=(8, 9), kernel=(1, 3), padding=(0, 1)),
    "dilated": Problem(channels=8, filters=16, dilation=(3, 3), padding=(3, 3), tile=2),
    "large-tile": Problem(size=(17, 20), tile=16, activation="leaky_relu"),
    "one-by-one": Problem(kernel=(1, 1), padding=(0, 0), channels=8, filters=8),
    "depthwise": Problem(channels=8, filters=8, depthwise=True, kernel=(5, 3), padding=(2, 1)),
    "depthwise-stride": Problem(channels=8, filters=8, depthwise=True, stride=(2, 2)),
    "one-pixel": Problem(batch=1, size=(1, 1)),
    "no-sample": Problem(batch=0),
}


def widened(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Within a rounding bound of the sums, and one unit in the last place of half precision."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    single = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 4 * terms * torch.finfo(single).eps * float(expected.abs().max().clamp_min(1))
    ulp = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    tiny = torch.finfo(dtype).tiny
    error = (actual.double() - expected).abs()
    assert bool((error <= bound + ulp * expected.abs() + tiny).all()), float(error.max())


def check_forward(
    ops: Any, p: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    tensors = p.tensors(dtype, device)
    y = ops.copruned_conv2d(*tensors, *p.options, p.activation)
    exact = reference.copruned_conv2d(*widened(tensors), *p.options, p.activation)
    weight = tensors[1]
    assert weight is not None
    assert_near(y, exact, dtype, weight[0].numel() + 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    x, _, _, region, filters, _, residual = tensors
    assert x is not None
    on = torch.ones_like(y, dtype=torch.bool)
    on = reference.apply_mask(on, reference.over_pixels(region, p.tile, *y.shape[2:])).bool()
    on = reference.apply_mask(on, reference.over_channels(filters, p.group)).bool()
    skipped = torch.zeros_like(y) if residual is None else residual
    assert torch.equal(y[~on], skipped[~on])


def check_backward(
    ops: Any, p: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    x, weight, _, region, filters, inputs, _ = p.tensors(dtype, device)
    assert x is not None
    assert weight is not None
    out = reference.output_size(p.size, p.kernel, p.stride, p.padding, p.dilation)
    g = torch.Generator().manual_seed(8)
    slope = torch.randn(p.batch, p.filters, *out, generator=g).to(device, dtype)
    masks = (region, filters, inputs)
    found = ops.copruned_conv2d_backward(slope, x, weight, *masks, *p.options, True, True, True)
    wide = (slope.double(), x.double(), weight.double())
    exact = reference.copruned_conv2d_backward(*wide, *masks, *p.options, True, True, True)
    terms = max(weight[:, 0].numel(), slope[:, :1].numel())
    for a, e in zip(found, exact, strict=True):
        assert_near(a, e, dtype, max(terms, 4))
    nothing = ops.copruned_conv2d_backward(slope, x, weight, *masks, *p.options, *[False] * 3)
    assert [t.numel() for t in nothing] == [0, 0, 0]


def check_list(ops: Any, mask: Tensor) -> None:
    items, count = ops.tile_list(mask)
    expected = mask.flatten().nonzero()[:, 0].int()
    assert int(count) == len(expected)
    assert torch.equal(items[: len(expected)], expected)
    assert bool((items[len(expected) :] == -1).all())
