"""The kernels on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sapwood.triton_kernels import logsemiring as kernels

from sapwood.ops.logsemiring import _triton
from tests.emulation import logsemiring_checks as checks
from tests.emulation.logsemiring_checks import SHAPES, Shape, operands

# inf - inf and huge quotients on purpose: what they are worth is decided afterwards.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
)

ops: Any = _triton  # the kernels' functions, under the names of the ops

HALVES = (torch.bfloat16, torch.float16)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 7, 33)], ids=lambda s: "x".join(map(str, s)))
def test_products(shape: Shape) -> None:
    checks.check_products(ops, shape, torch.float32)


@by_half
def test_products_in_half_precision(dtype: torch.dtype) -> None:
    checks.check_products(ops, (2, 5, 9, 18), dtype)


@pytest.mark.parametrize("scale", [30.0, 100.0, 1e4])
def test_products_at_scale(scale: float) -> None:
    checks.check_products(ops, (1, 17, 33, 16), torch.float32, scale)


def test_large_tiles() -> None:
    """The largest configuration, with some tiles that have a certificate and some that have not."""
    a, b, _ = operands((1, 140, 20, 70))
    a[0, 70:75] *= 100.0
    exact = ops.log_matmul(a, b, True)
    torch.testing.assert_close(ops.log_matmul(a, b, False), exact, rtol=2**-21, atol=2e-5)
    grad = torch.randn(1, 140, 70)
    for got, want in zip(
        ops.log_matmul_backward(grad, a, b, False, True, True),
        ops.log_matmul_backward(grad, a, b, True, True, True),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_gradients_of_one_operand() -> None:
    checks.check_wanted_gradients(ops)


def test_large_gradients() -> None:
    checks.check_large_gradients(ops)


@pytest.mark.parametrize("larger", [1, 2], ids=["term by term", "certified"])
def test_infinities(larger: int) -> None:
    assert (32 * 6 * 9 * larger > kernels._EXACT_TERMS) == (larger > 1)
    checks.check_infinities(ops, larger=larger)


def test_transposed_operands_are_bitwise_equal() -> None:
    checks.check_transposed(ops)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["float32", "bfloat16", "float16"])
def test_maxima(dtype: torch.dtype) -> None:
    checks.check_maxima(ops, dtype)


def test_maxima_of_infinities() -> None:
    checks.check_infinite_maxima(ops)


def test_draws() -> None:
    checks.check_draws(ops)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inner", [1, 5, 70])
def test_segments(inner: int, dtype: torch.dtype) -> None:
    checks.check_segments(ops, inner, dtype)


@pytest.mark.parametrize("k", [2, 3, 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_chains(rows: int, k: int) -> None:
    checks.check_chains(ops, rows, k)


@by_half
def test_chains_in_half_precision(dtype: torch.dtype) -> None:
    checks.check_chains(ops, 1, 5, dtype)


def test_chains_of_infinities() -> None:
    checks.check_infinite_chains(ops)


def test_long_chains_are_left_to_others() -> None:
    t, init = torch.zeros(1, 1, 65, 65), torch.zeros(1, 1, 65)
    assert _triton.why_not_chain(t, init, False) == "takes up to 64 states, not 65"
    assert _triton.why_not_chain(t[..., :64, :64], init, False) is None
    assert _triton.why_not_chain(t, init, True) == "takes the log semiring, not max"


def test_runs_are_bitwise_equal() -> None:
    checks.check_repeats(ops)
