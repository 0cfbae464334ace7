"""The CUDA kernels of similarity on a device: the samples of the emulation, then larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sapwood
from tests.emulation import similarity_checks as checks
from tests.emulation.similarity_checks import DTYPES, KINDS, SHAPES, Shape, problem

pytestmark = pytest.mark.gpu

LARGE: list[Shape] = [(3000, 0, 64), (1000, 2500, 300), (257, 5000, 33)]
by_shape = pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_kind = pytest.mark.parametrize("kind", KINDS)
ops: Any = torch.ops.sapwood


@by_dtype
@by_shape
def test_pairs(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_pairs(ops, *problem(shape, dtype, "cuda"), "cosine", 0.3)


@by_dtype
@by_shape
def test_topk(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_topk(ops, *problem(shape, dtype, "cuda"), "cosine", 10)


@by_kind
def test_kinds(kind: str) -> None:
    x, y = problem((200, 300, 20), device="cuda")
    threshold = -20.0 if kind == "euclidean" else 0.3
    checks.check_pairs(ops, x, y, kind, threshold)
    checks.check_topk(ops, x, y, kind, 33)
    checks.check_clusters(ops, x, kind, threshold)


@pytest.mark.parametrize("max_pairs", [0, 100, 10_000])
def test_max_pairs(max_pairs: int) -> None:
    x, y = problem((2000, 0, 8), device="cuda")
    checks.check_pairs(ops, x, y, "cosine", 0.5, max_pairs=max_pairs)


def test_gradients_repeat_bit_for_bit() -> None:
    x = problem((500, 0, 8), device="cuda")[0].nan_to_num(0, 0, 0).requires_grad_()
    grads = [
        torch.autograd.grad(sapwood.ops.similarity_pairs(x, threshold=0.5).value.sum(), x)[0]
        for _ in range(5)
    ]
    assert all(torch.equal(g, grads[0]) for g in grads)


def test_topk_in_a_cuda_graph() -> None:
    x = problem((300, 0, 16), device="cuda")[0]
    arguments = (None, 5, "cosine", False, False, True)
    wanted = ops.similarity_topk(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.similarity_topk(x, *arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
