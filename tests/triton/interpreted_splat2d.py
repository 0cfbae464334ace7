"""The kernels on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.ops.splat2d import _triton
from tests.emulation import splat2d_checks as checks
from tests.emulation.splat2d_checks import CUTOFF, Shape, problem
from tests.splat2d_scenes import Scene

SHAPES: list[Shape] = [
    (1, 1, 1, 1, 1),
    (1, 40, 3, 20, 33),
    (2, 20, 4, 17, 16),
    (1, 9, 6, 18, 18),
    (1, 12, 2, 7, 5),
    (2, 0, 3, 4, 4),
    (0, 3, 3, 4, 4),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


class Ops:
    """The kernels' functions under the names of the ops."""

    splat2d: Any = staticmethod(_triton.draw)
    splat2d_backward: Any = staticmethod(_triton.differentiate)


@by_shape
def test_image(shape: Shape) -> None:
    checks.check_image(Ops, problem(shape))


@by_shape
def test_gradients(shape: Shape) -> None:
    checks.check_gradients(Ops, problem(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype) -> None:
    checks.check_image(Ops, problem((1, 12, 3, 18, 20), dtype))
    checks.check_gradients(Ops, problem((1, 12, 3, 18, 20), dtype), stats=False)


def test_what_is_not_a_gaussian() -> None:
    checks.check_not_drawn(Ops)


def test_counts() -> None:
    scene = problem((3, 15, 3, 18, 20))
    counts = torch.tensor([15, 0, 6])
    image = Ops.splat2d(scene.mu, scene.chol, scene.feat, counts, *scene.size, CUTOFF)
    for b, count in enumerate(counts.tolist()):
        part = (t[b : b + 1, :count] for t in (scene.mu, scene.chol, scene.feat))
        assert torch.equal(image[b : b + 1], Ops.splat2d(*part, None, *scene.size, CUTOFF))


def test_more_gaussians_on_a_tile_than_a_round_holds() -> None:
    n = 1100  # a round queues up to 512
    mu = torch.full((1, n, 2), 3.0)
    chol = torch.tensor([0.3, 0.0, 0.3]).expand(1, n, 3)
    image = Ops.splat2d(mu, chol, torch.ones(1, n, 1), None, 5, 5, CUTOFF)
    assert image[0, 0, 3, 3].item() == n


def test_wide_gaussians() -> None:
    scene = problem((1, 4, 3, 20, 40))
    chol = torch.tensor([30.0, 10.0, 20.0]).expand_as(scene.chol)
    checks.check_gradients(Ops, Scene(scene.mu, chol, scene.feat, scene.size))
