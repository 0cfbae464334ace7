"""The Triton kernels of similarity on a device: the samples of the interpreter, and larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import sapwood
from sapwood.ops.similarity import _triton
from tests.emulation import similarity_checks as checks
from tests.emulation.similarity_checks import SHAPES, Shape, problem

pytestmark = pytest.mark.gpu

LARGE: list[Shape] = [(3000, 0, 64), (1000, 2500, 300), (257, 5000, 33)]
by_shape = pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "x".join(map(str, s)))
by_kind = pytest.mark.parametrize("kind", ["cosine", "correlation"])
by_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


class Ops:
    """The kernels' functions under the names of the ops."""

    similarity_pairs: Any = staticmethod(_triton.find_pairs)
    similarity_topk: Any = staticmethod(_triton.find_topk)
    similarity_clusters: Any = staticmethod(_triton.find_clusters)


@by_shape
def test_pairs(shape: Shape) -> None:
    checks.check_pairs(Ops, *problem(shape, device="cuda"), "cosine", 0.3)


@by_shape
@pytest.mark.parametrize("k", [1, 10, 100])
def test_topk(shape: Shape, k: int) -> None:
    checks.check_topk(Ops, *problem(shape, device="cuda"), "cosine", k)


@by_kind
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
def test_clusters(kind: str, threshold: float) -> None:
    checks.check_clusters(Ops, problem((1000, 0, 5), device="cuda")[0], kind, threshold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@by_precision
def test_half_precision(dtype: torch.dtype, precision: str) -> None:
    x = problem((1000, 0, 64), dtype, "cuda")[0]
    row, col, _, _ = _triton.find_pairs(x, None, 0.2, "cosine", False, False, -1, True, precision)
    s = checks.exact(x, None, "cosine")
    assert torch.equal(torch.stack([row, col], 1), (s >= 0.2).triu(1).nonzero())
    _, indices = _triton.find_topk(x, None, 10, "cosine", False, True, True, precision)
    torch.testing.assert_close(s.gather(1, indices), s.topk(10).values, rtol=0, atol=1e-12)


def test_repeats_bit_for_bit() -> None:
    x = problem((2000, 0, 8), device="cuda")[0]
    with sapwood.backend("triton"):
        results = [
            (
                *sapwood.ops.similarity_pairs(x, threshold=0.5),
                *sapwood.ops.similarity_topk(x, 10),
                sapwood.ops.similarity_clusters(x, threshold=0.9),
            )
            for _ in range(5)
        ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
