"""What every device kernel of logsemiring promises, whoever runs it: emulation, Triton or a GPU.

``ops`` has the ops of the family as attributes; tensors are on ``device``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sapwood.cli.benchmarks.logsemiring_circuits import addition
from sapwood.reference import logsemiring as reference
from tests import log_circuits

Shape = tuple[int, int, int, int]  # B, M, K, N

SHAPES: list[Shape] = [
    (1, 1, 1, 1),
    (2, 3, 5, 4),
    (1, 17, 33, 16),
    (2, 20, 40, 35),
    (1, 3, 0, 4),
    (0, 2, 3, 4),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def operands(
    shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k, n = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, m, k), (batch, k, n), (batch, m, n))
    a, b, grad = (torch.randn(s, generator=g) for s in sizes)
    return tuple(  # type: ignore[return-value]
        t.to(device, dtype) for t in (a * scale, b * scale, grad)
    )


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


def check_products(
    ops: Any, shape: Shape, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu"
) -> None:
    a, b, grad = operands(shape, dtype, scale, device)
    x, y, g = (t.double() for t in (a, b, grad))
    want = reference.log_matmul(x, y, False)
    wanted = reference.log_matmul_backward(g, x, y, False, True, True)
    for exact in (False, True):
        close(ops.log_matmul(a, b, exact), want)
        gradients = ops.log_matmul_backward(grad, a, b, exact, True, True)
        for got, gradient in zip(gradients, wanted, strict=True):
            # A probability carries the rounding of a + b.
            close(got, gradient, 1e-4 + 2**-20 * scale * max(shape))


def check_wanted_gradients(ops: Any, device: str = "cpu") -> None:
    a, b, grad = operands((2, 20, 40, 35), device=device)
    both = ops.log_matmul_backward(grad, a, b, False, True, True)
    for need in ((True, False), (False, True)):
        for one, of_both, needed in zip(
            ops.log_matmul_backward(grad, a, b, False, *need), both, need, strict=True
        ):
            assert torch.equal(one, of_both) if needed else one.shape == (0,)


def check_large_gradients(ops: Any, device: str = "cpu") -> None:
    """grad / sum would overflow; the gradient itself does not."""
    a, b, grad = operands((1, 17, 33, 16), scale=20.0, device=device)
    small = ops.log_matmul_backward(grad, a, b, False, True, True)
    for got, want in zip(
        ops.log_matmul_backward(grad * 2.0**100, a, b, False, True, True), small, strict=True
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got * 2.0**-100, want, rtol=1e-4, atol=1e-4)


def check_second_derivative(ops: Any, shape: Shape, device: str = "cpu") -> None:
    a, b, grad = (t.double() for t in operands(shape, device=device))
    ta, tb = torch.randn_like(a), torch.randn_like(b)
    for got, want in zip(
        ops.log_matmul_double_backward(grad, a, b, ta, tb),
        reference.log_matmul_double_backward(grad, a, b, ta, tb),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def infinite(device: str = "cpu") -> tuple[Tensor, Tensor]:
    a, b, _ = operands((1, 8, 6, 9), device=device)
    a[0, 0] = -math.inf
    a[0, 1, 2] = -math.inf
    a[0, 2, 1] = a[0, 2, 3] = math.inf
    a[0, 3, 0] = math.nan
    b[0, :, 4] = -math.inf
    return a, b


def check_infinities(ops: Any, device: str = "cpu", larger: int = 1) -> None:
    """``larger`` repeats the operands, so that the product is one of exponentials."""
    a, b = (t.repeat(1, *r) for t, r in zip(infinite(device), ((4, 1), (1, larger)), strict=True))
    c = ops.log_matmul(a, b, False)
    want = reference.log_matmul(a.double(), b.double(), False)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(c), test(want))
    grad = torch.ones_like(c)
    for got, expected in zip(
        ops.log_matmul_backward(grad, a, b, False, True, True),
        reference.log_matmul_backward(grad.double(), a.double(), b.double(), False, True, True),
        strict=True,
    ):
        close(got, expected, 1e-4)
    finite = a[:, [0, 1, 4, 5]]
    grad = torch.ones(1, 4, b.shape[2], device=device)
    da, _ = ops.log_matmul_backward(grad, finite, b, False, True, True)
    assert da.isfinite().all()
    assert da[finite == -math.inf].eq(0).all()


def check_transposed(ops: Any, device: str = "cpu") -> None:
    a, b, grad = operands((2, 20, 40, 35), device=device)
    same = a.mT.contiguous().mT, b.mT.contiguous().mT, grad.mT.contiguous().mT
    assert torch.equal(ops.log_matmul(a, b, False), ops.log_matmul(*same[:2], False))
    for got, want in zip(
        ops.log_matmul_backward(same[2], *same[:2], False, True, True),
        ops.log_matmul_backward(grad, a, b, False, True, True),
        strict=True,
    ):
        assert torch.equal(got, want)


def check_maxima(ops: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    a, b, _ = operands((2, 7, 20, 9), dtype, device=device)
    for got, want in zip(ops.max_matmul(a, b), reference.max_matmul(a, b), strict=True):
        assert torch.equal(got, want)
    a, b = a.round(), b.round()  # ties: the lowest index
    for got, want in zip(ops.max_matmul(a, b), reference.max_matmul(a, b), strict=True):
        assert torch.equal(got, want)


def check_infinite_maxima(ops: Any, device: str = "cpu") -> None:
    a, b = infinite(device)
    values, indices = ops.max_matmul(a, b)
    want, where = reference.max_matmul(a, b)
    torch.testing.assert_close(values, want, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(indices, where)


def check_draws(ops: Any, device: str = "cpu") -> None:
    a, b, _ = operands((2, 5, 20, 6), device=device)
    a[0, 1] = -math.inf
    for seed in (0, 1, 2**40 + 12345):
        drawn = ops.sample_matmul(a, b, 3, seed)
        assert torch.equal(drawn, reference.sample_matmul(a, b, 3, seed))
    assert drawn[:, 0, 1].eq(-1).all()


def check_segments(ops: Any, inner: int, dtype: torch.dtype, device: str = "cpu") -> None:
    g = torch.Generator().manual_seed(inner)
    x = torch.randn(2, 90, inner, generator=g).to(device, dtype)
    x[0, 3], x[0, 6, 0], x[1, 8], x[1, 3::4] = -math.inf, math.inf, math.nan, -math.inf
    index = torch.arange(90, device=device) % 4
    index[index == 2] = 1  # segment 2 is empty, segment 4 too
    order = index.argsort(stable=True)
    ptr = torch.nn.functional.pad(index.bincount(minlength=5).cumsum(0), (1, 0))
    wide = x.double()
    close(ops.segment_logsumexp(x, ptr, order), reference.segment_logsumexp(wide, ptr, order))
    close(ops.segment_softmax(x, ptr, order), reference.segment_softmax(wide, ptr, order))
    grad = torch.randn(2, 5, inner, generator=g).to(device, dtype)
    close(
        ops.segment_logsumexp_backward(grad, x, ptr, order),
        reference.segment_logsumexp_backward(grad.double(), wide, ptr, order),
    )
    sorted_x = x.index_select(1, order)
    torch.testing.assert_close(
        ops.segment_logsumexp(sorted_x, ptr, None),
        ops.segment_logsumexp(x, ptr, order),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def check_segment_second(ops: Any, inner: int, dtype: torch.dtype, device: str = "cpu") -> None:
    g = torch.Generator().manual_seed(inner)
    x, tangent = (torch.randn(2, 90, inner, generator=g).to(device, dtype) for _ in range(2))
    x[0, 3], x[1, 3::4] = -math.inf, -math.inf
    index = torch.arange(90, device=device) % 4
    order = index.argsort(stable=True)
    ptr = torch.nn.functional.pad(index.bincount(minlength=5).cumsum(0), (1, 0))
    grad = torch.randn(2, 5, inner, generator=g).to(device, dtype)
    wide = (t.double() for t in (grad, x, tangent))
    for got, want in zip(
        ops.segment_logsumexp_double_backward(grad, x, tangent, ptr, order),
        reference.segment_logsumexp_double_backward(*wide, ptr, order),
        strict=True,
    ):
        close(got, want)


def check_segment_maxima(ops: Any, inner: int, dtype: torch.dtype, device: str = "cpu") -> None:
    g = torch.Generator().manual_seed(inner)
    x = torch.randn(2, 90, inner, generator=g).mul(3).round().to(device, dtype)  # ties
    x[0, 6, 0], x[1, [8, 40]], x[1, 3::4] = math.inf, math.nan, -math.inf
    index = torch.arange(90, device=device) % 4
    index[index == 2] = 1  # segment 2 is empty, segment 4 too
    order = index.argsort(stable=True)
    ptr = torch.nn.functional.pad(index.bincount(minlength=5).cumsum(0), (1, 0))
    values, indices = ops.segment_max(x, ptr, order)
    want, where = reference.segment_max(x, ptr, order)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, where)


def check_paths(ops: Any, k: int, device: str = "cpu") -> None:
    g = torch.Generator().manual_seed(k)
    t, final = torch.randn(3, 6, k, k, generator=g), torch.randn(3, k, generator=g)
    t[0, 2], t[1, :, 0] = -math.inf, -math.inf  # a chain without mass, a state that leads nowhere
    t, final = t.to(device), final.to(device)
    start = torch.zeros(3, 1, k, device=device)
    for maximum in (False, True):
        states = reference.log_scan(t, start, maximum)[:, :, 0]
        for seed in (0, 2**40 + 12345):
            got = ops.log_scan_path(t, states, final, 4, seed, maximum)
            want = reference.log_scan_path(t, states, final, 4, seed, maximum)
            assert torch.equal(got, want)
        assert got[:, 0].eq(-1).all()


def check_best_chains(ops: Any, rows: int, k: int, device: str = "cpu") -> None:
    """The max-plus form; rounded, so that there are ties."""
    g = torch.Generator().manual_seed(rows * 100 + k)
    t = torch.randn(2, 4, k, k, generator=g).mul(2).round()
    t[0, 1, 0], t[1, 2, 0, 1], t[1, 3] = -math.inf, math.nan, -math.inf
    t, init = t.to(device), torch.randn(2, rows, k, generator=g).to(device)
    states = ops.log_scan(t, init, True)
    torch.testing.assert_close(states, reference.log_scan(t, init, True), equal_nan=True)
    grad = torch.randn(states.shape, generator=g, dtype=torch.float64).to(device)
    for got, want in zip(
        ops.log_scan_backward(grad, t, states, True),
        reference.log_scan_backward(grad, t, states, True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def check_chains(
    ops: Any, rows: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    g = torch.Generator().manual_seed(rows * 100 + k)
    t = torch.randn(2, 4, k, k, generator=g).to(device, dtype)
    init = torch.randn(2, rows, k, generator=g).to(device, dtype)
    t[0, 1, 0] = -math.inf
    states = ops.log_scan(t, init, False)
    torch.testing.assert_close(states, reference.log_scan(t, init, False))
    grad = torch.randn(states.shape, generator=g, dtype=torch.float64).to(device)
    for got, want in zip(
        ops.log_scan_backward(grad, t, states, False),
        reference.log_scan_backward(grad, t, states, False),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert ops.log_scan(t[:, :0], init, False).shape == (2, 1, rows, k)


def check_infinite_chains(ops: Any, device: str = "cpu") -> None:
    g = torch.Generator().manual_seed(3)
    t, init = torch.randn(4, 5, 3, 3, generator=g), torch.randn(4, 2, 3, generator=g)
    t[0, 2], t[1, 1, 0, 1], t[2, 3, 1, 1], init[3] = -math.inf, math.inf, math.nan, -math.inf
    t, init = t.to(device), init.to(device)
    states = ops.log_scan(t, init, False)
    torch.testing.assert_close(states, reference.log_scan(t, init, False), equal_nan=True)
    grad = torch.ones_like(states)
    for got, want in zip(
        ops.log_scan_backward(grad, t, states, False),
        reference.log_scan_backward(grad, t, states, False),
        strict=True,
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def check_repeats(ops: Any, shape: Shape = (1, 17, 33, 16), device: str = "cpu") -> None:
    a, b, grad = operands(shape, device=device)
    first = ops.log_matmul_backward(grad, a, b, False, True, True)
    for _ in range(3):
        again = ops.log_matmul_backward(grad, a, b, False, True, True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def check_circuits(ops: Any, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Any circuit, with infinities and NaN in one row each."""
    circuit, columns = log_circuits.anything(seed, 3 * (seed % 12), 5 * (seed % 9), 40)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 7, circuit.inputs // 3, generator=g)
    x[:, 1, ::2], x[0, 2, :1], x[0, 3, :1] = -math.inf, math.nan, math.inf
    grad = torch.randn(7, circuit.num_results, generator=g).to(device, dtype)
    x, seen = x.to(device, dtype), log_circuits.evidence(seed, 7, columns).to(device)
    rest = (seen, circuit.tables(x.device), circuit.counts)
    got, want = ops.log_circuit(x, *rest), reference.log_circuit(x.double(), *rest)
    close(got, want)
    slopes = ops.log_circuit_backward(grad, x, *rest)
    close(slopes, reference.log_circuit_backward(grad.double(), x.double(), *rest), 5e-5)
    assert torch.equal(slopes, ops.log_circuit_backward(grad, x, *rest)) or slopes.isnan().any()
    strided = x.mT.contiguous().mT
    torch.testing.assert_close(ops.log_circuit(strided, *rest), got, rtol=0, atol=0, equal_nan=True)


def check_addition(ops: Any, digits: int, device: str = "cpu") -> None:
    """A long circuit of few terms, at scales where a product of masses underflows."""
    circuit = addition(digits)
    g = torch.Generator().manual_seed(digits)
    x = 1e4 * torch.randn(2 * digits, 5, 10, generator=g).to(device)
    seen = torch.randint(10, (5, digits + 1), generator=g)
    seen[:, -1] %= 2
    rest = (seen.to(device), circuit.tables(x.device), circuit.counts)
    got, want = ops.log_circuit(x, *rest), reference.log_circuit(x.double(), *rest)
    torch.testing.assert_close(got.double(), want, rtol=2**-22, atol=0)
    grad = torch.ones_like(got)
    slopes = ops.log_circuit_backward(grad, x, *rest)
    close(slopes, reference.log_circuit_backward(grad.double(), x.double(), *rest))
