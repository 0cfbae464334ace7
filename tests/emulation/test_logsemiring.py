"""The CUDA kernels of logsemiring, compiled for the host and run on CPU tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation import logsemiring_checks as checks
from tests.emulation.logsemiring_checks import DTYPES, SHAPES, Shape

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@by_shape
def test_products(ops: Any, shape: Shape) -> None:
    checks.check_products(ops, shape, torch.float32)


@by_dtype
def test_products_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_products(ops, (2, 5, 9, 18), dtype)


@pytest.mark.parametrize("scale", [30.0, 100.0, 1e4])
def test_products_at_scale(ops: Any, scale: float) -> None:
    checks.check_products(ops, (1, 17, 33, 16), torch.float32, scale)


def test_gradients_of_one_operand(ops: Any) -> None:
    checks.check_wanted_gradients(ops)


def test_large_gradients(ops: Any) -> None:
    checks.check_large_gradients(ops)


@pytest.mark.parametrize("shape", [(1, 2, 3, 2), (2, 17, 5, 33)], ids=["small", "tiles"])
def test_second_derivative(ops: Any, shape: Shape) -> None:
    checks.check_second_derivative(ops, shape)


def test_infinities(ops: Any) -> None:
    checks.check_infinities(ops)


def test_transposed_operands_are_bitwise_equal(ops: Any) -> None:
    checks.check_transposed(ops)


@by_dtype
def test_maxima(ops: Any, dtype: torch.dtype) -> None:
    checks.check_maxima(ops, dtype)


def test_maxima_of_infinities(ops: Any) -> None:
    checks.check_infinite_maxima(ops)


def test_draws(ops: Any) -> None:
    checks.check_draws(ops)


@by_dtype
@pytest.mark.parametrize("inner", [1, 5])
def test_segments(ops: Any, inner: int, dtype: torch.dtype) -> None:
    checks.check_segments(ops, inner, dtype)


@pytest.mark.parametrize("k", [2, 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_chains(ops: Any, rows: int, k: int) -> None:
    checks.check_chains(ops, rows, k)


@by_dtype
@pytest.mark.parametrize("inner", [1, 5])
def test_segment_second(ops: Any, inner: int, dtype: torch.dtype) -> None:
    checks.check_segment_second(ops, inner, dtype)


@by_dtype
@pytest.mark.parametrize("inner", [1, 5])
def test_segment_maxima(ops: Any, inner: int, dtype: torch.dtype) -> None:
    checks.check_segment_maxima(ops, inner, dtype)


@pytest.mark.parametrize("k", [2, 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_best_chains(ops: Any, rows: int, k: int) -> None:
    checks.check_best_chains(ops, rows, k)


@pytest.mark.parametrize("k", [2, 17])
def test_paths(ops: Any, k: int) -> None:
    checks.check_paths(ops, k)


def test_chains_of_infinities(ops: Any) -> None:
    checks.check_infinite_chains(ops)


def test_runs_are_bitwise_equal(ops: Any) -> None:
    checks.check_repeats(ops)


@by_dtype
@pytest.mark.parametrize("seed", [0, 13, 29, 35])
def test_circuits(ops: Any, seed: int, dtype: torch.dtype) -> None:
    checks.check_circuits(ops, seed, dtype)


@pytest.mark.parametrize("digits", [1, 4, 15])
def test_additions(ops: Any, digits: int) -> None:
    checks.check_addition(ops, digits)
