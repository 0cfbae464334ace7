"""copruned_conv: images, gradients and results that reach beyond 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from .memory import FAR, last_blocks, last_of, on_linux, reserved

pytestmark = on_linux

CHANNELS = 16
HEIGHT, WIDTH = 2**14, 2**13 + 64  # of images of more than 2^31 values
POINTWISE = ([1, 1], [0, 0], [1, 1], 1, 64, 16)  # and tiles of 64 x 64, groups of 16 filters
TAPS = ([1, 1], [1, 1], [1, 1], 1, 8, 16)
BATCH = FAR // (CHANNELS * 32 * 32) + 1  # small images, of which the last blocks see the last


def large_image(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """An image, channels last, of zeros but for its last tile; that tile; the mask of tiles."""
    x = reserved(1, HEIGHT, WIDTH, CHANNELS, dtype=dtype).permute(0, 3, 1, 2)
    x[0, :, -64:, -64:] = torch.randn(CHANNELS, 64, 64)
    region = torch.zeros(1, HEIGHT // 64, WIDTH // 64, dtype=torch.bool)
    region[0, -1, -1] = True
    return x, x[:, :, -64:, -64:].contiguous(), region


def test_strided() -> None:
    """The wanted tile reads the last pixels of an image of more than 2^31 values."""
    x, corner, region = large_image()
    weight = torch.randn(16, CHANNELS, 1, 1)
    shape = ([8, 8], [0, 0], [1, 1], 1, 8, 16)
    masks = (region, None, None)
    y = torch.ops.sapwood.copruned_conv2d(x, weight, None, *masks, None, *shape, "none")
    expected = conv2d(corner, weight, stride=8)
    torch.testing.assert_close(y[:, :, -8:, -8:], expected)
    assert float(y.abs().sum()) == float(y[:, :, -8:, -8:].abs().sum())

    grad = torch.zeros_like(y)
    grad[:, :, -8:, -8:] = torch.randn(1, 16, 8, 8)
    backward = torch.ops.sapwood.copruned_conv2d_backward
    _, found, _ = backward(grad, x, weight, *masks, *shape, False, True, False)
    near = grad[:, :, -8:, -8:].contiguous()
    wanted = conv2d_weight(corner, [16, CHANNELS, 1, 1], near, stride=8)
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_result_of_2_31_values() -> None:
    x, corner, region = large_image(torch.bfloat16)
    weight = torch.randn(16, CHANNELS, 1, 1).bfloat16()
    rest = (region, None, None, None, *POINTWISE, "none")
    y = torch.ops.sapwood.copruned_conv2d(x, weight, None, *rest)
    wanted = conv2d(corner.float(), weight.float())
    torch.testing.assert_close(y[:, :, -64:, -64:].float(), wanted, rtol=2**-8, atol=1e-6)
    assert not y[:, :, -65].any()


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_gradient_of_an_image_of_2_31_values() -> None:
    grad, corner, region = large_image(torch.bfloat16)
    weight = torch.randn(16, CHANNELS, 1, 1).bfloat16()
    x = weight.new_zeros(1, 1, 1, 1).expand(grad.shape)  # of which only the shape counts
    rest = (weight, region, None, None, *POINTWISE, True, False, False)
    found, _, _ = torch.ops.sapwood.copruned_conv2d_backward(grad, x, *rest)
    wanted = conv2d_input(corner.shape, weight.float(), corner.float())
    torch.testing.assert_close(found[:, :, -64:, -64:].float(), wanted, rtol=2**-8, atol=1e-6)
    assert not found[:, :, -65].any()


# Emulated kernels ---------------------------------------------------------------------------------


def channels_last(near: Tensor) -> Tensor:
    """``BATCH`` images in channels-last memory: zeros, and at the end ``near``."""
    return last_of(near.permute(0, 2, 3, 1).contiguous(), BATCH).permute(0, 3, 1, 2)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_last_image(emulated: Any, depthwise: bool, masked: bool) -> None:
    """A block has 64 pixels, or 8 of a depthwise convolution: rows of the last tile."""
    x, residual = torch.randn(2, 1, CHANNELS, 32, 32)
    weight = torch.randn(CHANNELS, 1 if depthwise else CHANNELS, 3, 3)
    groups = CHANNELS if depthwise else 1
    shape = (*TAPS[:3], groups, *TAPS[4:])
    region = last_of(torch.ones(1, 4, 4, dtype=torch.bool), BATCH) if masked else None
    filters = last_of(torch.ones(1, 1, dtype=torch.bool), BATCH) if masked else None
    far = channels_last(x)
    with last_blocks():
        masks = (region, filters, filters)
        y = emulated.copruned_conv2d(
            far, weight, None, *masks, channels_last(residual), *shape, "relu"
        )
        assert y.numel() > FAR
        dx, _, _ = emulated.copruned_conv2d_backward(
            far, far, weight, *masks, *shape, True, False, False
        )
    wanted = conv2d(x, weight, padding=1, groups=groups).relu() + residual
    gradient = conv2d_input(x.shape, weight, x, padding=1, groups=groups)
    for found, want in ((y, wanted), (dx, gradient)):
        torch.testing.assert_close(
            found[-1:, :, -1, -8:], want[:, :, -1, -8:], rtol=1e-4, atol=1e-4
        )


def test_filling_the_last_image(emulated: Any) -> None:
    """What is left out of the last image; a block fills 128 values."""
    x, residual = torch.randn(2, 1, CHANNELS, 32, 32)
    region = last_of(torch.zeros(1, 4, 4, dtype=torch.bool), BATCH)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3)
    with last_blocks():
        rest = (None, region, None, None, channels_last(residual), *TAPS, "none")
        y = emulated.copruned_conv2d(channels_last(x), weight, *rest)
    assert torch.equal(y[-1, :, -1, -8:], residual[0, :, -1, -8:])


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_gradient_of_the_weight(emulated: Any, depthwise: bool) -> None:
    """Each block adds the last tile of an image, and of a gradient, of more than 2^31 values."""
    x, corner, region = large_image()
    groups = CHANNELS if depthwise else 1
    shape = (*POINTWISE[:3], groups, *POINTWISE[4:])
    weight = torch.randn(CHANNELS, 1 if depthwise else CHANNELS, 1, 1)
    rest = (weight, region, None, None, *shape, False, True, True)
    _, found, bias = emulated.copruned_conv2d_backward(x, x, *rest)
    wanted = conv2d_weight(corner, weight.shape, corner, groups=groups)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(bias, corner.sum((0, 2, 3)), rtol=1e-4, atol=1e-2)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "dilation", "what"),
    [
        (2**24, 1, r"stride, padding and dilation must be below 2\^24"),
        (1, 2**24, r"stride, padding and dilation must be below 2\^24"),
        (1, 20_000, "must give windows of fewer than 134217728 pixels"),
    ],
)
def test_windows_that_places_cannot_number(stride: int, dilation: int, what: str) -> None:
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    size = 3 if max(stride, dilation) < 2**24 else 1
    region = torch.zeros(1, size, size, dtype=torch.bool)
    region[0, 0, 0] = True
    padding = min(dilation, 2**24 - 1)
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2, 1, 4, 8, "none")
    with pytest.raises(RuntimeError, match=what):
        torch.ops.sapwood.copruned_conv2d(x, weight, None, region, None, None, None, *rest)


def test_more_tiles_than_indices_hold_are_refused(ops: Any) -> None:
    mask = torch.ones(1, dtype=torch.bool).expand(FAR)
    with pytest.raises(RuntimeError, match=r"tile_list: mask must have fewer than 2\^31 entries"):
        ops.tile_list(mask)
