"""splat2d: images, gradients and features that reach beyond 2^31 elements."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from .memory import FAR, apart, last_blocks, last_of, on_linux, reserved

pytestmark = on_linux

CUTOFF = 11.0


def gaussians(batch: int, n: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """mu, chol and feat around (8, 8)."""
    mu = 8 + 4 * torch.randn(batch, n, 2)
    chol = torch.tensor([2.0, 0.3, 1.5]).expand(batch, n, 3).contiguous()
    return mu, chol, torch.randn(batch, n, channels)


def test_operands_far_apart(ops: Any) -> None:
    scene = gaussians(3, 4, 3)
    image = ops.splat2d(*scene, None, 16, 20, CUTOFF)
    pairs = ops.splat2d_pairs(*scene[:2], None, 16, 20, CUTOFF)
    for dim in range(3):
        far = [apart(t, dim) for t in scene]
        assert torch.equal(ops.splat2d(*far, None, 16, 20, CUTOFF), image)
        assert torch.equal(ops.splat2d_pairs(*far[:2], None, 16, 20, CUTOFF), pairs)


def test_splat2d_backward(ops: Any) -> None:
    """The gradient of the second image lies 2^31 elements behind that of the first."""
    near = torch.randn(2, 3, 20, 30)
    far = reserved(FAR + near[0].numel()).as_strided(near.shape, (FAR, 600, 30, 1))
    far.copy_(near)
    mu, chol = 10 + 4 * torch.randn(2, 5, 2), torch.tensor([2.0, 0.3, 1.5]).expand(2, 5, 3)
    rest = (mu, chol.contiguous(), torch.randn(2, 5, 3), None, 11.0, True)
    found = ops.splat2d_backward(far, *rest)
    for a, b in zip(found, ops.splat2d_backward(near, *rest), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_of_an_image_of_2_31_values(emulated: Any) -> None:
    """Contiguous: the kernel itself walks to the last pixels of the last channel."""
    side, channels = 23_200, 4
    mu, chol, feat = gaussians(1, 3, channels)
    near = torch.randn(1, channels, 32, 32)
    far = reserved(1, channels, side, side)
    far[..., -32:, -32:] = near
    found = emulated.splat2d_backward(far, mu + side - 24, chol, feat, None, CUTOFF, True)
    wanted = emulated.splat2d_backward(near, mu + 8, chol, feat, None, CUTOFF, True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)  # mu is rounded


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_image_of_2_31_values() -> None:
    side, channels = 23_200, 2
    mu, chol, feat = gaussians(2, 3, channels)
    mu = mu.round()  # exact at both places
    image = torch.ops.sapwood.splat2d(mu + side - 16, chol, feat, None, side, side, CUTOFF)
    assert image.numel() > FAR
    want = torch.ops.sapwood.splat2d(mu, chol, feat, None, 16, 16, CUTOFF)
    torch.testing.assert_close(image[..., -16:, -16:], want)


def test_last_tile_of_an_image_of_2_31_values(emulated: Any) -> None:
    side, channels = 23_200, 4
    mu, chol, feat = gaussians(1, 3, channels)
    mu = mu.round()
    with last_blocks():
        image = emulated.splat2d(mu + side - 16, chol, feat, None, side, side, CUTOFF)
    assert image.numel() > FAR
    want = emulated.splat2d(mu, chol, feat, None, 16, 16, CUTOFF)
    torch.testing.assert_close(image[..., -16:, -16:], want)


def test_last_image_of_2_31_features(emulated: Any) -> None:
    """Images of one pixel and 33 channels, each with a Gaussian of its own."""
    count, channels = 2**26, 33
    mu, chol, feat = gaussians(1, 1, channels)
    scene = [last_of(t, count) for t in (mu / 8, chol, feat)]
    with last_blocks():
        image = emulated.splat2d(*scene, None, 1, 1, CUTOFF)
    assert feat.numel() * count > FAR
    assert torch.equal(image[-1:], emulated.splat2d(mu / 8, chol, feat, None, 1, 1, CUTOFF))


def test_pairs_of_2_32() -> None:
    """More pairs of pixels and Gaussians than 32 bits count."""
    side = 2**16
    mu, chol = torch.full((1, 1, 2), 5.0), torch.tensor([[[1.0, 0.0, 1.0]]])
    count = torch.ops.sapwood.splat2d_pairs(mu, chol, None, side, side, math.inf)
    assert count.tolist() == [side * side]


@pytest.mark.slow
def test_pairs_of_an_emulated_warp(emulated: Any) -> None:
    side = 46_400  # more than 2^31 pixels
    mu, chol = torch.full((1, 1, 2), 5.0), torch.tensor([[[1.0, 0.0, 1.0]]])
    count = emulated.splat2d_pairs(mu, chol, None, side, side, math.inf)
    assert count.tolist() == [side * side]
