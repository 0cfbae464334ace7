"""The CUDA and Triton kernels of logsemiring on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sapwood
from sapwood.ops.logsemiring import _triton
from tests.emulation import logsemiring_checks as checks
from tests.emulation.logsemiring_checks import DTYPES, SHAPES, Shape, operands

pytestmark = pytest.mark.gpu

LARGE: list[Shape] = [(1, 256, 256, 256), (3, 130, 700, 65), (300, 10, 10, 19)]
by_shape = pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["cuda", "triton"])
def ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "cuda":
        return torch.ops.sapwood
    pytest.importorskip("triton", reason="triton is not installed")
    return _triton


def skip_double(ops: Any, dtype: torch.dtype) -> None:
    if ops is _triton and dtype == torch.float64:
        pytest.skip("the Triton kernels take up to float32")


@by_dtype
@by_shape
def test_products(ops: Any, shape: Shape, dtype: torch.dtype) -> None:
    skip_double(ops, dtype)
    checks.check_products(ops, shape, dtype, device="cuda")


@pytest.mark.parametrize("scale", [30.0, 100.0, 1e4])
def test_products_at_scale(ops: Any, scale: float) -> None:
    checks.check_products(ops, (2, 100, 120, 90), torch.float32, scale, "cuda")


def test_gradients(ops: Any) -> None:
    checks.check_wanted_gradients(ops, "cuda")
    checks.check_large_gradients(ops, "cuda")
    checks.check_transposed(ops, "cuda")


def test_second_derivative() -> None:
    checks.check_second_derivative(torch.ops.sapwood, (2, 17, 50, 33), "cuda")


@pytest.mark.parametrize("larger", [1, 2])
def test_infinities(ops: Any, larger: int) -> None:
    checks.check_infinities(ops, "cuda", larger)
    checks.check_infinite_maxima(ops, "cuda")
    checks.check_infinite_chains(ops, "cuda")


@by_dtype
def test_maxima(ops: Any, dtype: torch.dtype) -> None:
    skip_double(ops, dtype)
    checks.check_maxima(ops, dtype, "cuda")


def test_draws_are_those_of_the_cpu(ops: Any) -> None:
    """A logarithm that differs in the last place may decide a near tie otherwise."""
    a, b, _ = operands((2, 50, 40, 30))
    want = torch.ops.sapwood.sample_matmul(a, b, 20, 2**40 + 1)
    drawn = ops.sample_matmul(a.cuda(), b.cuda(), 20, 2**40 + 1).cpu()
    assert (drawn == want).double().mean() >= 0.9999


@by_dtype
@pytest.mark.parametrize("inner", [1, 5, 130])
def test_segments(ops: Any, inner: int, dtype: torch.dtype) -> None:
    skip_double(ops, dtype)
    checks.check_segments(ops, inner, dtype, "cuda")


@pytest.mark.parametrize("k", [2, 17, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_chains(ops: Any, rows: int, k: int) -> None:
    checks.check_chains(ops, rows, k, device="cuda")


@by_dtype
@pytest.mark.parametrize("inner", [1, 5, 130])
def test_segment_maxima(inner: int, dtype: torch.dtype) -> None:
    checks.check_segment_maxima(torch.ops.sapwood, inner, dtype, "cuda")
    checks.check_segment_second(torch.ops.sapwood, inner, dtype, "cuda")


@pytest.mark.parametrize("k", [2, 17, 64])
def test_paths(k: int) -> None:
    checks.check_best_chains(torch.ops.sapwood, 2, k, "cuda")
    checks.check_paths(torch.ops.sapwood, k, "cuda")


def test_twenty_runs_are_bitwise_equal(ops: Any) -> None:
    a, b, grad = operands((2, 200, 150, 180), scale=30.0, device="cuda")
    first = ops.log_matmul_backward(grad, a, b, False, True, True)
    for _ in range(20):
        again = ops.log_matmul_backward(grad, a, b, False, True, True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_hundred_thousand_small_products(ops: Any) -> None:
    a, b, _ = operands((100_000, 2, 2, 2), device="cuda")
    want = torch.logsumexp(a[..., None] + b[:, None], 2)
    torch.testing.assert_close(ops.log_matmul(a, b, False), want)


def test_cpu_and_cuda_agree() -> None:
    """Values within 1e-6 relative, gradients of unit G within 1e-5."""
    a, b, _ = operands((1, 100, 200, 90))
    results = []
    for device in ("cpu", "cuda"):
        x, y = (t.to(device).requires_grad_() for t in (a, b))
        c = sapwood.ops.log_matmul(x, y)
        results.append([t.cpu() for t in (c.detach(), *torch.autograd.grad(c.sum(), (x, y)))])
    (c, *gradients), (d, *others) = results
    torch.testing.assert_close(c, d, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients, others, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_in_a_cuda_graph() -> None:
    a, b, _ = operands((1, 64, 64, 64), device="cuda")
    wanted = torch.ops.sapwood.log_matmul(a, b, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.sapwood.log_matmul(a, b, False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)


@by_dtype
@pytest.mark.parametrize("seed", [0, 13, 29, 35])
def test_circuits(seed: int, dtype: torch.dtype) -> None:
    checks.check_circuits(torch.ops.sapwood, seed, dtype, "cuda")


@pytest.mark.parametrize("digits", [1, 4, 15])
def test_additions(digits: int) -> None:
    checks.check_addition(torch.ops.sapwood, digits, "cuda")
