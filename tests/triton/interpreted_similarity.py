"""The kernels on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sapwood.triton_kernels import similarity as kernels
from sapwood.triton_kernels._similarity_kernels import candidates_kernel, join_kernel

from sapwood.ops.similarity import _triton
from tests.emulation import similarity_checks as checks
from tests.emulation.similarity_checks import Shape, problem

SHAPES: list[Shape] = [(0, 0, 4), (1, 0, 3), (70, 0, 9), (3, 130, 17), (66, 65, 40), (4, -1, 5)]
SMALL: Shape = (19, 0, 6)


class Ops:
    """The kernels' functions under the names of the ops."""

    similarity_pairs: Any = staticmethod(_triton.find_pairs)
    similarity_topk: Any = staticmethod(_triton.find_topk)
    similarity_clusters: Any = staticmethod(_triton.find_clusters)


by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_half = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)
by_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@by_shape
def test_pairs(shape: Shape) -> None:
    checks.check_pairs(Ops, *problem(shape), "cosine", 0.3)


@by_half
def test_half_precision(dtype: torch.dtype) -> None:
    checks.check_pairs(Ops, *problem(SMALL, dtype), "cosine", 0.2)
    checks.check_topk(Ops, *problem(SMALL, dtype), "cosine", 3)
    checks.check_clusters(Ops, problem(SMALL, dtype)[0], "cosine", 0.5)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0])
def test_thresholds(threshold: float) -> None:
    checks.check_pairs(Ops, *problem(SMALL), "correlation", threshold, include_self=True)
    checks.check_pairs(Ops, *problem(SMALL), "correlation", threshold, absolute=True)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 rows have room for 280 candidates at a time."""
    monkeypatch.setattr(kernels, "_ROOM", 1)


@pytest.mark.usefixtures("little_room")
def test_more_pairs_than_the_buffer_holds() -> None:
    checks.check_pairs(Ops, *problem((70, 0, 3)), "cosine", -1.0)  # 2415 pairs
    checks.check_pairs(Ops, *problem((70, 0, 3)), "cosine", -1.0, max_pairs=600)


@pytest.mark.usefixtures("little_room")
def test_more_ties_than_the_buffer_holds() -> None:
    x = problem((3, 0, 5))[0].repeat(40, 1)
    checks.check_topk(Ops, x, None, "cosine", 7)


@by_shape
def test_topk(shape: Shape) -> None:
    checks.check_topk(Ops, *problem(shape), "cosine", 3)


@pytest.mark.parametrize("k", [1, 2, 8, 9, 40, 300, 310])
@pytest.mark.parametrize("absolute", [False, True], ids=["signed", "absolute"])
def test_topk_with_groups_of_every_size(k: int, absolute: bool) -> None:
    checks.check_topk(Ops, *problem((20, 300, 6)), "correlation", k, absolute=absolute)
    checks.check_topk(Ops, *problem((140, 0, 6)), "cosine", k, absolute=absolute)


def test_topk_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MAXIMA", 1000)
    checks.check_topk(Ops, *problem((140, 0, 6)), "cosine", 3)


def test_ties_go_to_the_smaller_index() -> None:
    x = torch.randn(5, 4).repeat(30, 1)  # more equals than a row has places
    values, indices = _triton.find_topk(x, None, 10, "cosine", False, False, True)
    wanted = [[j for j in range(i % 5, 150, 5) if j != i][:10] for i in range(150)]
    assert indices.tolist() == wanted
    torch.testing.assert_close(values, torch.ones(150, 10))
    _, indices = _triton.find_topk(x, None, 10, "cosine", False, True, True)
    assert indices.tolist() == [list(range(i % 5, 50, 5)) for i in range(150)]


@by_precision
def test_values_closer_than_products_can_tell(precision: str) -> None:
    """All rows lie within the bound of the k-th best product."""
    x = torch.randn(1, 30, dtype=torch.float64) + 1e-7 * torch.randn(90, 30, dtype=torch.float64)
    x = x.float()
    values, indices = _triton.find_topk(x, None, 6, "cosine", False, False, True, precision)
    s = checks.exact(x, None, "cosine").fill_diagonal_(-torch.inf)
    torch.testing.assert_close(s.gather(1, indices), s.topk(6).values, rtol=0, atol=1e-15)
    torch.testing.assert_close(values.double(), s.topk(6).values)


def test_ranking_by_products_alone() -> None:
    x, _ = problem(SMALL)
    values, indices = _triton.find_topk(x, None, 4, "cosine", False, True, False)
    s = checks.exact(x, None, "cosine")
    torch.testing.assert_close(s.gather(1, indices), s.topk(4).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(values.double(), s.topk(4).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "correlation"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.6, 0.99])
def test_clusters(kind: str, threshold: float) -> None:
    for shape in (SMALL, (70, 0, 4), (0, 0, 3), (1, 0, 3)):
        checks.check_clusters(Ops, problem(shape)[0], kind, threshold)


@pytest.mark.usefixtures("little_room")
def test_a_chain_is_one_cluster() -> None:
    angle = torch.randperm(150, generator=torch.Generator().manual_seed(0)).double() * 1e-2
    x = torch.stack([angle.cos(), angle.sin()], 1).float()
    assert not _triton.find_clusters(x, 0.9999, "cosine", False).any()
    assert int(_triton.find_clusters(x, 0.99999, "cosine", False).max()) == 149


def test_joining_in_any_order() -> None:
    """A star, a chain from both ends and repeated edges, more than one program has."""
    n = 700
    order = torch.randperm(n - 1, generator=torch.Generator().manual_seed(1)).int()
    row = torch.cat([order, order, torch.zeros(5, dtype=torch.int32)])
    col = torch.cat([order + 1, order + 1, torch.full((5,), n, dtype=torch.int32)])
    parent = torch.arange(n + 2, dtype=torch.int32)
    join_kernel[(6,)](parent, row, col, len(row), BLOCK_E=256)
    assert kernels._flattened(parent).tolist() == [0] * (n + 1) + [n + 1]


@by_precision
def test_lower_precision_changes_no_result(precision: str) -> None:
    x, _ = problem((66, 0, 40))
    row, col, value, _ = _triton.find_pairs(
        x, None, 0.1, "cosine", False, False, -1, True, precision
    )
    s = checks.exact(x, None, "cosine")
    assert torch.equal(torch.stack([row, col], 1), (s >= 0.1).triu(1).nonzero())
    torch.testing.assert_close(value.double(), s[row, col])


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
    sizes = (64, columns, 2, 0, len(keys))
    tile = {"BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 16}
    flags = {"SELF": False, "INCLUDE_SELF": False, "ABSOLUTE": False}
    candidates_kernel[(1,)](x, x, torch.ones(64), keys, found, *sizes, **flags, **tile)
    rows = torch.arange(64)[:, None]
    assert torch.equal(keys.sort().values, (rows * columns + torch.arange(16)).flatten())
    assert int(found) == len(keys)
