"""The CUDA kernels of logsemiring, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.reference import logsemiring as reference

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 17, 33, 16), (2, 20, 40, 35), (1, 3, 0, 4), (0, 2, 3, 4)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


def operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k, n = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, m, k), (batch, k, n), (batch, m, n))
    a, b, grad = (torch.randn(s, generator=g) for s in sizes)
    return (a * scale).to(dtype), (b * scale).to(dtype), grad.to(dtype)


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    half = actual.dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        atol=atol + (4 * eps if half else 0),
        rtol=eps if half else 2**-21,
        equal_nan=True,
    )


def check_all(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> None:
    a, b, grad = operands(shape, dtype, scale)
    x, y, g = (t.double() for t in (a, b, grad))
    close(ops.log_matmul(a, b, False), reference.log_matmul(x, y, False))
    args = (True, True, True)
    for got, want in zip(
        ops.log_matmul_backward(grad, a, b, *args),
        reference.log_matmul_backward(g, x, y, *args),
        strict=True,
    ):
        # A probability carries the rounding of a + b.
        close(got, want, 1e-4 + 2**-20 * scale * max(shape))


@by_shape
def test_products(ops: Any, shape: tuple[int, ...]) -> None:
    check_all(ops, shape, torch.float32)


@by_dtype
def test_products_dtype(ops: Any, dtype: torch.dtype) -> None:
    check_all(ops, (2, 5, 9, 18), dtype)


@pytest.mark.parametrize("scale", [30.0, 100.0, 1e4])
def test_products_at_scale(ops: Any, scale: float) -> None:
    check_all(ops, (1, 17, 33, 16), torch.float32, scale)


@pytest.mark.parametrize("shape", [(1, 2, 3, 2), (2, 17, 5, 33)], ids=["small", "tiles"])
def test_second_derivative(ops: Any, shape: tuple[int, ...]) -> None:
    a, b, grad = (t.double() for t in operands(shape))
    ta, tb = torch.randn_like(a), torch.randn_like(b)
    for got, want in zip(
        ops.log_matmul_double_backward(grad, a, b, ta, tb),
        reference.log_matmul_double_backward(grad, a, b, ta, tb),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def infinite() -> tuple[Tensor, Tensor]:
    a, b, _ = operands((1, 8, 6, 9))
    a[0, 0] = -math.inf
    a[0, 1, 2] = -math.inf
    a[0, 2, 1] = a[0, 2, 3] = math.inf
    a[0, 3, 0] = math.nan
    b[0, :, 4] = -math.inf
    return a, b


def test_infinities(ops: Any) -> None:
    a, b = infinite()
    c = ops.log_matmul(a, b, False)
    want = reference.log_matmul(a.double(), b.double(), False)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(c), test(want))
    finite = a[:, [0, 1, 4, 5]]
    grad = torch.ones(1, 4, 9)
    da, _ = ops.log_matmul_backward(grad, finite, b, False, True, True)
    assert da.isfinite().all()
    assert da[finite == -math.inf].eq(0).all()


def test_transposed_operands_are_bitwise_equal(ops: Any) -> None:
    a, b, grad = operands((2, 20, 40, 35))
    same = a.mT.contiguous().mT, b.mT.contiguous().mT, grad.mT.contiguous().mT
    assert torch.equal(ops.log_matmul(a, b, False), ops.log_matmul(*same[:2], False))
    for got, want in zip(
        ops.log_matmul_backward(same[2], *same[:2], False, True, True),
        ops.log_matmul_backward(grad, a, b, False, True, True),
        strict=True,
    ):
        assert torch.equal(got, want)


@by_dtype
def test_maxima(ops: Any, dtype: torch.dtype) -> None:
    a, b, _ = operands((2, 7, 20, 9), dtype)
    for got, want in zip(ops.max_matmul(a, b), reference.max_matmul(a, b), strict=True):
        assert torch.equal(got, want)


def test_maxima_of_infinities(ops: Any) -> None:
    a, b = infinite()
    values, indices = ops.max_matmul(a, b)
    want, where = reference.max_matmul(a, b)
    torch.testing.assert_close(values, want, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(indices, where)


def test_draws(ops: Any) -> None:
    a, b, _ = operands((2, 5, 20, 6))
    a[0, 1] = -math.inf
    for seed in (0, 2**40 + 12345):
        drawn = ops.sample_matmul(a, b, 3, seed)
        assert torch.equal(drawn, reference.sample_matmul(a, b, 3, seed))
    assert drawn[:, 0, 1].eq(-1).all()


@by_dtype
@pytest.mark.parametrize("inner", [1, 5])
def test_segments(ops: Any, inner: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 90, inner).to(dtype)
    x[0, 3] = -math.inf
    index = torch.arange(90) % 4
    index[index == 2] = 1  # segment 2 is empty, segment 4 too
    order = index.argsort(stable=True)
    ptr = torch.nn.functional.pad(index.bincount(minlength=5).cumsum(0), (1, 0))
    wide = x.double()
    close(ops.segment_logsumexp(x, ptr, order), reference.segment_logsumexp(wide, ptr, order))
    close(ops.segment_softmax(x, ptr, order), reference.segment_softmax(wide, ptr, order))
    grad = torch.randn(2, 5, inner).to(dtype)
    close(
        ops.segment_logsumexp_backward(grad, x, ptr, order),
        reference.segment_logsumexp_backward(grad.double(), wide, ptr, order),
    )
    sorted_x = x.index_select(1, order)
    assert torch.equal(
        ops.segment_logsumexp(sorted_x, ptr, None), ops.segment_logsumexp(x, ptr, order)
    )


@pytest.mark.parametrize("k", [2, 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_chains(ops: Any, rows: int, k: int) -> None:
    t, init = torch.randn(2, 4, k, k), torch.randn(2, rows, k)
    t[0, 1, 0] = -math.inf
    states = ops.log_scan(t, init)
    torch.testing.assert_close(states, reference.log_scan(t, init))
    grad = torch.randn_like(states)
    for got, want in zip(
        ops.log_scan_backward(grad, t, states),
        reference.log_scan_backward(grad, t, states),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert ops.log_scan(t[:, :0], init).shape == (2, 1, rows, k)


def test_runs_are_bitwise_equal(ops: Any) -> None:
    a, b, grad = operands((1, 17, 33, 16))
    first = ops.log_matmul_backward(grad, a, b, False, True, True)
    for _ in range(3):
        again = ops.log_matmul_backward(grad, a, b, False, True, True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
