"""The kernel on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sapwood.triton_kernels._similarity_kernels import candidates_kernel

from sapwood.ops.similarity import _triton
from tests.emulation import similarity_checks as checks
from tests.emulation.similarity_checks import Shape, problem

SHAPES: list[Shape] = [(0, 0, 4), (1, 0, 3), (70, 0, 9), (3, 130, 17), (66, 65, 40), (4, -1, 5)]
SMALL: Shape = (19, 0, 6)


class Ops:
    """The kernel's function under the name of the op."""

    similarity_pairs: Any = staticmethod(_triton.find_pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_pairs(shape: Shape) -> None:
    checks.check_pairs(Ops, *problem(shape), "cosine", 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype) -> None:
    checks.check_pairs(Ops, *problem(SMALL, dtype), "cosine", 0.2)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0])
def test_thresholds(threshold: float) -> None:
    checks.check_pairs(Ops, *problem(SMALL), "correlation", threshold, include_self=True)
    checks.check_pairs(Ops, *problem(SMALL), "correlation", threshold, absolute=True)


def test_more_pairs_than_the_first_buffer_holds() -> None:
    checks.check_pairs(Ops, *problem((70, 0, 3)), "cosine", -1.0)  # 2415 pairs, room for 1024


@pytest.mark.parametrize("max_pairs", [0, 1, 20, 10_000])
def test_max_pairs(max_pairs: int) -> None:
    checks.check_pairs(Ops, *problem(SMALL), "cosine", 0.1, max_pairs=max_pairs)


def test_products_alone() -> None:
    x, _ = problem(SMALL)
    row, col, value, _ = _triton.find_pairs(x, None, 0.3, "cosine", False, False, -1, False)
    s = checks.exact(x, None, "cosine")
    assert torch.equal(torch.stack([row, col], 1), (s >= 0.3).triu(1).nonzero())
    torch.testing.assert_close(value.double(), s[row, col], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [2**26, 2**31 - 1])
def test_keys_beyond_32_bits(columns: int) -> None:
    """The first tile of a wide problem: only the candidates it reads exist."""
    x = torch.ones(64, 2)
    keys, found = torch.zeros(64 * 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    sizes = (64, columns, 2, len(keys), 1.0)
    tile = {"BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 16}
    flags = {"SELF": False, "INCLUDE_SELF": False, "ABSOLUTE": False}
    candidates_kernel[(1,)](x, x, keys, found, *sizes, **flags, **tile)
    rows = torch.arange(64)[:, None]
    assert torch.equal(keys.sort().values, (rows * columns + torch.arange(16)).flatten())
    assert int(found) == len(keys)
