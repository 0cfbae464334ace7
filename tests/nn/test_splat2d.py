"""Splat2d: what it draws, how it trains, and what keeps its shapes valid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sapwood import nn as sparse_nn
from sapwood.nn.splat2d import clamp_geometry_, rescale
from sapwood.reference import splat2d as reference


def picture(**options: Any) -> sparse_nn.Splat2d:
    generator = torch.Generator().manual_seed(0)
    module = sparse_nn.Splat2d(20, (12, 16), generator=generator, **options)
    with torch.no_grad():
        module.feat.copy_(torch.randn(module.feat.shape, generator=generator))
    return module


@pytest.mark.parametrize("size", [None, (12, 16), (24, 40), (5, 3)])
def test_forward_is_the_sum(size: tuple[int, int] | None) -> None:
    module = picture(dtype=torch.float64)
    height, width = size or (12, 16)
    scale = torch.tensor([width / 16, height / 12, height / 12], dtype=torch.float64)
    mu = (module.mu + 0.5) * scale[:2] - 0.5
    args = (t[None] for t in (mu, module.chol * scale, module.feat))
    expected = reference.splat2d(*args, None, height, width, module.cutoff)[0]
    torch.testing.assert_close(module(size), expected, rtol=0, atol=1e-10)


def test_a_mean_of_one_colour_is_that_colour() -> None:
    module = picture(mode="norm")
    with torch.no_grad():
        module.feat.fill_(0.7)
    torch.testing.assert_close(module(), torch.full((3, 12, 16), 0.7), rtol=0, atol=1e-3)


def test_state_and_gradients() -> None:
    module = picture()
    module().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    other = sparse_nn.Splat2d(20, (12, 16))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(), module())
    assert repr(module) == "Splat2d(n=20, size=(12, 16), channels=3, mode=sum)"


def test_clamping_keeps_shapes_valid() -> None:
    torch.manual_seed(0)
    module = picture()
    with torch.no_grad():
        module.mu.copy_(100 * torch.randn(20, 2))
        module.chol.copy_(100 * torch.randn(20, 3))
    module.clamp_()
    l1, l2, l3 = module.chol.detach().unbind(-1)
    assert module.mu.min().item() == -0.5
    assert module.mu.detach().amax(0).tolist() == [15.5, 11.5]
    assert float(torch.minimum(l1, l3).min()) == pytest.approx(0.3)
    assert float(torch.maximum(l1, l3).max()) == 16
    assert bool((l2.abs() <= 4 * l3).all())
    before = module.chol.detach().clone()
    module.clamp_()
    assert torch.equal(before, module.chol)


def test_clamping_leaves_valid_shapes_alone() -> None:
    mu, chol = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, -2.0, 0.5]]])
    before = mu.clone(), chol.clone()
    clamp_geometry_(mu, chol, (12, 16))
    assert torch.equal(mu, before[0])
    assert torch.equal(chol, before[1])
    clamp_geometry_(mu, chol, (1, 1), sigma_min=2.0)
    assert chol.tolist() == [[[2.0, -2.0, 2.0]]]


def test_rescaling_there_and_back() -> None:
    mu, chol = torch.rand(9, 2).double() * 10, torch.rand(9, 3).double() + 1
    there = rescale(mu, chol, (12, 16), (30, 20))
    back = rescale(*there, (30, 20), (12, 16))
    torch.testing.assert_close(back, (mu, chol))
    corner = rescale(torch.tensor([[-0.5, 11.5]]), chol[:1].float(), (12, 16), (30, 20))[0]
    assert corner.tolist() == [[-0.5, 29.5]]


def test_empty() -> None:
    assert not sparse_nn.Splat2d(0, (3, 4), 2)().any()


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((-1, (3, 4)), {}, "n must be at least 0, got -1"),
        ((2, (0, 4)), {}, r"size must be two sizes of at least 1, got \(0, 4\)"),
        ((2, (4,)), {}, r"size must be two sizes of at least 1, got \(4,\)"),
        ((2, (3, 4), 0), {}, "channels must be at least 1, got 0"),
        ((2, (3, 4)), {"mode": "max"}, "mode must be one of sum, norm, got 'max'"),
        ((2, (3, 4)), {"cutoff": math.nan}, "cutoff must be positive, got nan"),
    ],
)
def test_errors(arguments: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.Splat2d: {text}"):
        sparse_nn.Splat2d(*arguments, **options)
