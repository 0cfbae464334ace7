"""The CUDA kernels of similarity, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation import run_similarity
from tests.emulation import similarity_checks as checks
from tests.emulation.similarity_checks import DTYPES, KINDS, SHAPES, Shape, problem

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_kind = pytest.mark.parametrize("kind", KINDS)
SMALL: Shape = (19, 0, 6)
TWO: Shape = (12, 21, 5)


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@by_shape
@pytest.mark.parametrize("kind", ["cosine", "correlation"])
def test_row_normalize(ops: Any, shape: Shape, kind: str) -> None:
    if kind == "cosine" or shape[2] > 1:
        checks.check_row_normalize(ops, problem(shape)[0], kind)


@by_dtype
def test_row_normalize_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_row_normalize(ops, problem(SMALL, dtype)[0], "correlation")


def test_row_normalize_scales(ops: Any) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    scaled = x * torch.tensor([[1e-300], [1e300], [1e-160], [1e160]], dtype=torch.float64)
    got = ops.row_normalize(scaled, "cosine")
    torch.testing.assert_close(got, torch.nn.functional.normalize(x))


@by_shape
def test_pairs(ops: Any, shape: Shape) -> None:
    checks.check_pairs(ops, *problem(shape), "cosine", 0.3)


@by_kind
@pytest.mark.parametrize("shape", [SMALL, TWO], ids=["self", "two"])
def test_pairs_kind(ops: Any, shape: Shape, kind: str) -> None:
    threshold = -6.0 if kind == "euclidean" else 0.2
    checks.check_pairs(ops, *problem(shape), kind, threshold)


@by_dtype
def test_pairs_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_pairs(ops, *problem(SMALL, dtype), "cosine", 0.2)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0])
def test_pairs_at_the_ends_of_the_range(ops: Any, threshold: float) -> None:
    checks.check_pairs(ops, *problem(SMALL), "cosine", threshold, include_self=True)
    checks.check_pairs(ops, *problem(SMALL), "cosine", threshold, absolute=True)


@pytest.mark.parametrize("max_pairs", [0, 1, 20, 10_000])
def test_max_pairs(ops: Any, max_pairs: int) -> None:
    checks.check_pairs(ops, *problem(SMALL), "cosine", 0.1, max_pairs=max_pairs)


def test_more_pairs_than_the_first_buffer_holds(ops: Any) -> None:
    checks.check_pairs(ops, *problem((70, 0, 3)), "cosine", -1.0)  # 2415 pairs, room for 1024


def test_a_permission_that_is_not_used_changes_nothing(ops: Any) -> None:
    x, _ = problem(SMALL)
    arguments = (0.2, "cosine", False, False, -1, True)
    found = zip(
        ops.similarity_pairs(x, None, *arguments),
        ops.similarity_pairs(x, None, *arguments, "bf16"),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in found)


@by_shape
def test_topk(ops: Any, shape: Shape) -> None:
    checks.check_topk(ops, *problem(shape), "cosine", 3)


@by_kind
@pytest.mark.parametrize("shape", [SMALL, TWO], ids=["self", "two"])
def test_topk_kind(ops: Any, shape: Shape, kind: str) -> None:
    checks.check_topk(ops, *problem(shape), kind, 4)
    checks.check_topk(ops, *problem(shape), kind, 30, absolute=True)


@by_dtype
def test_topk_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_topk(ops, *problem(SMALL, dtype), "cosine", 2)


@by_kind
def test_clusters(ops: Any, kind: str) -> None:
    threshold = -4.0 if kind == "euclidean" else 0.6
    checks.check_clusters(ops, problem(SMALL)[0], kind, threshold)
    checks.check_clusters(ops, problem((70, 0, 4))[0], kind, threshold)


def test_layouts_are_bitwise_equal(ops: Any) -> None:
    x, y = problem(TWO)
    assert y is not None
    wanted = ops.similarity_topk(x, y, 3, "cosine", False, False, True)
    gaps = torch.empty(2 * len(x), 3 * x.shape[1])[::2, ::3].copy_(x)
    for same in (gaps, x.T.contiguous().T):
        got = ops.similarity_topk(same, y, 3, "cosine", False, False, True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_twenty_runs_are_bitwise_equal(ops: Any) -> None:
    first = run_similarity.run(ops, run_similarity.REPEATED)
    for _ in range(19):
        assert run_similarity.run(ops, run_similarity.REPEATED) == first


def test_results_do_not_depend_on_the_order_of_blocks(ops: Any, emulation_library: Path) -> None:
    shuffled = emulation_library.with_name("_ops_emu_shuffled.so")
    if not shuffled.is_file():
        pytest.fail(f"{shuffled.name} is missing: build it with 'make emulation'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulation.run_similarity", str(shuffled)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert json.loads(done.stdout) == run_similarity.run(ops, run_similarity.ALL)


def test_digests_differ_for_different_rows(ops: Any) -> None:
    digests = run_similarity.run(ops, run_similarity.ALL)
    assert len(set(digests.values())) > len(run_similarity.ALL)
    assert all(len(d) == hashlib.sha256().digest_size * 2 for d in digests.values())


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "row_normalize",
            (X, "dot"),
            "row_normalize: kind must be one of cosine, correlation, got dot",
        ),
        (
            "similarity_pairs",
            (X, X[:, 1:], 0.5, "cosine", False, False, -1, True),
            "similarity_pairs: y must have shape (4, 3), got (4, 2)",
        ),
        (
            "similarity_pairs",
            (X, X.double(), 0.5, "cosine", False, False, -1, True),
            "similarity_pairs: y must be of x's dtype, got Double",
        ),
        (
            "similarity_pairs",
            (X, None, 0.5, "cosine", False, False, -1, True, "fp16"),
            "similarity_pairs: precision must be one of fp32, bf16, got fp16",
        ),
        (
            "similarity_topk",
            (X, None, 1, "cosine", False, False, False, "bf16"),
            "similarity_topk: precision must be fp32 without recheck, got bf16",
        ),
        (
            "similarity_topk",
            (X, None, 0, "cosine", False, False, True),
            "similarity_topk: k must be at least 1, got 0",
        ),
        (
            "similarity_topk",
            (X[0], None, 1, "cosine", False, False, True),
            "similarity_topk: x must have 2 dimensions, got shape (3,)",
        ),
        (
            "similarity_clusters",
            (X.int(), 0.5, "cosine", False),
            "similarity_clusters: x must be float32, float64, float16 or bfloat16, got Int",
        ),
    ],
)
def test_inconsistent_arguments_are_refused(
    ops: Any, op: str, arguments: tuple[Any, ...], message: str
) -> None:
    for namespace in (ops, torch.ops.sapwood):
        with pytest.raises(RuntimeError) as raised:
            getattr(namespace, op)(*arguments)
        assert f"sapwood.{message}" in str(raised.value)
