"""The CUDA kernels of splat2d on a device: the samples of the emulation, then larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.ops import splat2d, splat2d_backward
from tests.emulation import splat2d_checks as checks
from tests.emulation.splat2d_checks import CUTOFF, DTYPES, SHAPES, Shape, problem
from tests.splat2d_scenes import random_scene

pytestmark = pytest.mark.gpu

LARGE: list[Shape] = [(2, 300, 3, 100, 150), (1, 100, 17, 60, 50)]
by_shape = pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
ops: Any = torch.ops.sapwood


@by_dtype
@by_shape
def test_image(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_image(ops, problem(shape, dtype, "cuda"))


@by_dtype
@by_shape
def test_gradients(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_gradients(ops, problem(shape, dtype, "cuda"))


@by_shape
def test_pairs(shape: Shape) -> None:
    checks.check_pairs(ops, problem(shape, device="cuda"))


def test_counts() -> None:
    checks.check_counts(ops, problem((5, 60, 3, 50, 70), device="cuda"))


def test_what_is_not_a_gaussian() -> None:
    checks.check_not_drawn(ops, "cuda")


def test_twenty_runs_are_bitwise_equal() -> None:
    scene = random_scene(2, 3000, 3, (200, 300))
    args = [t.cuda() for t in (scene.mu, scene.chol, scene.feat)]
    grad = torch.randn(2, 3, 200, 300, device="cuda")

    def run() -> list[torch.Tensor]:
        grads = splat2d_backward(grad, *args, with_stats=True)
        return [splat2d(*args, scene.size), *(g for g in grads if g is not None)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_in_a_cuda_graph() -> None:
    scene = problem((1, 200, 3, 64, 80), device="cuda")
    args = (scene.mu, scene.chol, scene.feat, None)
    wanted = ops.splat2d(*args, *scene.size, CUTOFF)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.splat2d(*args, *scene.size, CUTOFF)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)
