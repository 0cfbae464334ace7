"""Any shape, layout, scale and infinity: the log semiring's ops against the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sapwood import ops
from sapwood.reference import logsemiring as reference
from tests.properties.strategies import EXAMPLES, laid_out

SPECIAL = (-torch.inf, torch.inf, torch.nan)
SCALES = (1.0, 30.0, 1e4)
LAYOUTS = ("contiguous", "sliced", "offset", "transposed")

sizes = st.integers(0, 9)


@st.composite
def tensors(draw: st.DrawFn, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Normal numbers of one scale, some of them infinite or NaN, in any layout."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from(SCALES))
    special = draw(st.lists(st.sampled_from(SPECIAL), max_size=3))
    layout = draw(st.sampled_from(LAYOUTS))
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=g) * scale
        for value in special if x.numel() > 0 else ():
            x.view(-1)[int(torch.randint(x.numel(), (), generator=g))] = value
        found.append(laid_out(x, layout))
    return tuple(found)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """a (B, M, K), b (B, K, N) and a gradient; one in three is large enough for the certificate."""
    batch, m, k, n = (draw(sizes) for _ in range(4))
    if draw(st.integers(0, 2)) == 0:
        batch, m, k, n = 1, m + 12, k + 12, n + 12
    a, b = draw(tensors((batch, m, k), (batch, k, n)))
    return a, b, torch.randn(batch, m, n, generator=torch.Generator().manual_seed(m * n))


def same_kind(got: Tensor, want: Tensor) -> None:
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(got), test(want))


@EXAMPLES
@given(products(), st.sampled_from(["auto", "exact"]))
def test_log_matmul(problem: tuple[Tensor, Tensor, Tensor], method: str) -> None:
    a, b, grad = problem
    x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
    c = ops.log_matmul(x, y, method=method)
    wide = a.double(), b.double()
    want = reference.log_matmul(*wide, True)
    same_kind(c, want)
    finite = want.isfinite()
    assert ((c - want).abs() <= 2e-5 + 2**-21 * want.abs())[finite].all()
    wanted = reference.log_matmul_backward(grad.double(), *wide, True, True, True)
    for got, g in zip(torch.autograd.grad(c, (x, y), grad), wanted, strict=True):
        same_kind(got, g)
        bound = 1e-5 * grad.abs().amax() * max(grad.shape) if grad.numel() > 0 else 0.0
        assert ((got - g).abs() <= bound)[g.isfinite()].all()


@EXAMPLES
@given(products())
def test_max_matmul(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, _ = problem
    for got, want in zip(ops.max_matmul(a, b), reference.max_matmul(a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """x (O, n, I), the segment of each of the n entries, and how many segments there are."""
    outer, n, inner, count = draw(sizes), draw(st.integers(0, 40)), draw(sizes), draw(sizes)
    count = max(count, 1)
    (x,) = draw(tensors((outer, n, inner)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return x, torch.randint(count, (n,), generator=g), count


@EXAMPLES
@given(divisions())
def test_segments(problem: tuple[Tensor, Tensor, int]) -> None:
    x, index, count = problem
    plan = ops.SegmentPlan(index, count)
    leaf = x.detach().requires_grad_()
    y = ops.segment_logsumexp(leaf, plan=plan, dim=1)
    want = reference.segment_logsumexp(x.double(), plan.ptr, plan.order)
    same_kind(y, want)
    assert ((y - want).abs() <= 2e-5 + 2**-21 * want.abs())[want.isfinite()].all()
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    p = reference.segment_softmax(x.double(), plan.ptr, plan.order)
    torch.testing.assert_close(grad.double(), p, rtol=0, atol=1e-5, equal_nan=True)
    found = ops.segment_max(x, plan=plan, dim=1)
    for got, wanted in zip(found, reference.segment_max(x, plan.ptr, plan.order), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    batch, length, k = draw(st.integers(0, 10)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    t, init = draw(tensors((batch, length, k, k), (batch, k)))
    return t, init


@EXAMPLES
@given(chains(), st.booleans())
def test_chains(problem: tuple[Tensor, Tensor], maximum: bool) -> None:
    t, init = problem
    x, y = t.detach().requires_grad_(), init.detach().requires_grad_()
    semiring = "max" if maximum else "log"
    states = ops.log_scan(x, y, return_all=True, semiring=semiring)
    wide = reference.log_scan(t.double(), init.double()[:, None], maximum)
    want = wide[:, 1:, 0].float()
    same_kind(states, want)
    torch.testing.assert_close(states.detach(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    dt, _ = torch.autograd.grad(states.sum(), (x, y))
    ones = torch.ones_like(wide)
    ones[:, 0] = 0
    wanted, _ = reference.log_scan_backward(ones, t.double(), wide, maximum)
    torch.testing.assert_close(dt.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
