"""What the logsemiring family promises on values and gradients at any scale of the logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood import ops
from sapwood.reference import logsemiring as reference

INF = math.inf
SCALES = (1.0, 20.0, 30.0, 50.0, 100.0, 1e4)
SHAPES = ((1, 1, 1), (5, 7, 3), (65, 64, 33), (40, 1, 65), (17, 200, 65), (300, 20, 2))  # M, K, N
METHODS = ("auto", "exact")

raw: Any = torch.ops.sapwood


def problem(shape: tuple[int, int, int], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, k, n = shape
    g = torch.Generator().manual_seed(m * 10007 + k * 101 + n)
    a = torch.randn(m, k, generator=g, dtype=torch.float64) * scale
    return a.to(dtype), (torch.randn(k, n, generator=g, dtype=torch.float64) * scale).to(dtype)


def wide(a: Tensor, b: Tensor) -> Tensor:
    return torch.logsumexp(a.double()[:, :, None] + b.double()[None], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values(shape: tuple[int, int, int], scale: float, method: str) -> None:
    a, b = problem(shape, scale, torch.float32)
    c, want = ops.log_matmul(a, b, method=method), wide(a, b)
    assert c.isfinite().all()
    assert ((c - want).abs() <= 2e-5 + 2**-21 * want.abs()).all()


@pytest.mark.parametrize("scale", SCALES)
def test_values_256(scale: float) -> None:
    a, b = problem((256, 256, 256), scale, torch.float32)
    c, want = ops.log_matmul(a, b), wide(a, b)
    assert ((c - want).abs() <= 2e-5 + 2**-21 * want.abs()).all()


@pytest.mark.parametrize("scale", SCALES)
def test_gradients(scale: float) -> None:
    """Within 1e-5 max|G| N of float64, finite, and each output hands out all of its gradient."""
    a, b = (t.requires_grad_() for t in problem((40, 50, 60), scale, torch.float32))
    g = torch.randn(40, 60)
    da, db = torch.autograd.grad(ops.log_matmul(a, b), (a, b), g)
    x, y = (t.detach().double().requires_grad_() for t in (a, b))
    wanted = torch.autograd.grad(wide(x, y), (x, y), g.double())
    for got, want in zip((da, db), wanted, strict=True):
        assert got.isfinite().all()
        assert (got - want).abs().max() <= 1e-5 * g.abs().max() * 60
    torch.testing.assert_close(da.sum(1), g.sum(1), atol=1e-5 * 60, rtol=0)
    torch.testing.assert_close(db.sum(0), g.sum(0), atol=1e-5 * 40, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("value", [1.0, -3e30])
def test_gradient_of_a_sum(value: float, scale: float) -> None:
    """It arrives expanded, and may be so large that grad / S would overflow."""
    a, b = (t.requires_grad_() for t in problem((50, 40, 60), scale, torch.float32))
    c = ops.log_matmul(a, b)
    expanded = torch.tensor(value).expand(50, 60)
    whole = torch.autograd.grad(c, (a, b), expanded, retain_graph=True)
    for got, want in zip(whole, torch.autograd.grad(c, (a, b), expanded.clone()), strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().all()
    torch.testing.assert_close(whole[0].sum(1) / value, torch.full((50,), 60.0))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_sum_to_one(scale: float) -> None:
    """One output at a time, with maxima that do not lie at the same k."""
    a, b = (t.requires_grad_() for t in problem((12, 70, 12), scale, torch.float32))
    c = ops.log_matmul(a, b)
    for i, j in itertools.product(range(0, 12, 5), repeat=2):
        (da,) = torch.autograd.grad(c[i, j], a, retain_graph=True)
        assert abs(da.sum() - 1) <= 1e-5


class TestCertificate:
    """Certified results are right although the product flushes subnormal numbers."""

    @pytest.mark.parametrize("k", [64, 512])
    @pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
    def test_sound(self, k: int, scale: float) -> None:
        a, b = problem((64, k, 64), scale, torch.float32)
        alpha, beta = a.double().amax(1, keepdim=True), b.double().amax(0, keepdim=True)
        log_s = wide(a, b) - alpha - beta
        certified = log_s >= math.log(k) - 102 * math.log(2) + 1
        c = ops.log_matmul(a, b).double()
        # The relative error of S, beside the rounding of alpha + beta + log S itself.
        bound = (k + 200) * 2.0**-24 + 2.0**-23 * (alpha.abs() + beta.abs() + log_s.abs())
        assert ((c - wide(a, b)).abs() <= bound)[certified].all()
        if scale == 20 and k == 512:
            assert certified.double().mean() >= 0.98

    def test_aligned_worst_case(self) -> None:
        """S a little above the threshold, every term at the edge of underflow."""
        k = 64
        total = math.log(1.01 * k) - 102 * math.log(2)
        half = total / 2 - math.log(k) / 2
        a, b = torch.full((32, k + 2), half), torch.full((k + 2, 32), half)
        a[:, 0], b[0] = 0.0, -INF  # the maxima of rows and columns meet no partner
        b[1], a[:, 1] = 0.0, -INF
        c, want = ops.log_matmul(a, b), wide(a, b)
        assert ((c - want).abs() <= 2e-5 + 2**-21 * want.abs()).all()


def special(kind: str) -> tuple[Tensor, Tensor]:
    a, b = problem((48, 40, 48), 1.0, torch.float32)
    if kind == "row":
        a[5] = -INF
    elif kind == "column":
        b[:, 7] = -INF
    elif kind == "matrix":
        a[:] = -INF
    elif kind == "one finite":
        a[5] = -INF
        a[5, 3] = 1.5
    elif kind == "some":
        a[torch.arange(48) % 3 == 0, ::2] = -INF
        b[1::3] = -INF
    elif kind == "plus":
        a[4, 9] = a[4, 11] = INF
    elif kind == "nan":
        b[6, 2] = math.nan
    elif kind == "plus minus":
        a[3, 3], b[3, 5] = INF, -INF
    return a, b


KINDS = ("row", "column", "matrix", "one finite", "some", "plus", "nan", "plus minus")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_infinities(kind: str, method: str) -> None:
    """Where the float64 policy says -inf, +inf, NaN or a zero gradient, so it is, exactly."""
    a, b = (t.requires_grad_() for t in special(kind))
    c = ops.log_matmul(a, b, method=method)
    x, y = (t.detach().double()[None].requires_grad_() for t in (a, b))
    want = reference.log_matmul(x, y, True)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(c), test(want[0]))
    torch.testing.assert_close(c.double(), want[0], equal_nan=True, atol=2e-5, rtol=1e-6)
    g = torch.ones_like(c)
    gradients = torch.autograd.grad(c, (a, b), g)
    expected = reference.log_matmul_backward(g.double()[None], x, y, True, True, True)
    for got, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), e[0], equal_nan=True, atol=1e-5, rtol=1e-5)
    zero = torch.isneginf(a) & ~expected[0][0].isnan()
    assert gradients[0][zero].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_terms(method: str) -> None:
    a, b = torch.empty(3, 0, requires_grad=True), torch.empty(0, 4)
    c = ops.log_matmul(a, b, method=method)
    assert c.eq(-INF).all()
    assert torch.autograd.grad(c.sum(), a)[0].shape == (3, 0)


def test_one_term_is_an_addition() -> None:
    a, b = torch.randn(30, 1) * 1e4, torch.randn(1, 30) * 1e4
    assert torch.equal(ops.log_matmul(a, b, method="exact"), a + b)


def test_vectors_and_batches() -> None:
    a, b = torch.randn(3, 1, 4, 5), torch.randn(2, 5, 6)
    want = torch.logsumexp(a[..., None] + b[:, None], -2)
    torch.testing.assert_close(ops.log_matmul(a, b), want)
    v, w = torch.randn(5), torch.randn(5, 6)
    torch.testing.assert_close(ops.log_matmul(v, w), torch.logsumexp(v[:, None] + w, 0))
    torch.testing.assert_close(ops.log_matmul(v, v), torch.logsumexp(2 * v, 0))
    torch.testing.assert_close(ops.log_matmul(w.T, v), torch.logsumexp(v[:, None] + w, 0))


def test_max_is_the_cold_limit() -> None:
    a, b = problem((20, 30, 20), 1.0, torch.float64)
    limit = ops.log_matmul(100 * a, 100 * b) / 100
    values = ops.max_matmul(a, b).values
    assert ((limit - values).abs() <= math.log(30) / 100).all()


def test_ties_give_the_lowest_index() -> None:
    values, indices = ops.max_matmul(torch.zeros(3, 70), torch.zeros(70, 40))
    assert indices.eq(0).all()
    assert values.eq(0).all()


def test_draws_follow_the_distribution() -> None:
    """Chi-square at 1e5 draws, for 20 distributions, probabilities down to 1e-4."""
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(5)
    for k in range(2, 52, 5):
        for low in (0.1, 1e-4):
            p = torch.rand(k, generator=generator).double() + low
            p[0] = low * p.sum()
            p /= p.sum()
            logits = p.log()[None]
            drawn = ops.sample_matmul(
                logits, torch.zeros(k, 1), num_samples=100_000, generator=generator
            )
            counts = torch.bincount(drawn.flatten(), minlength=k).double()
            assert scipy_stats.chisquare(counts.numpy(), (p * 100_000).numpy()).pvalue > 1e-3


def test_draws_do_not_depend_on_threads(threads: None) -> None:
    a, b = torch.randn(2, 30, 20), torch.randn(2, 20, 30)
    drawn = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        g = torch.Generator().manual_seed(3)
        drawn.append(ops.sample_matmul(a, b, num_samples=2, generator=g))
    assert all(torch.equal(d, drawn[0]) for d in drawn)
    assert ops.sample_matmul(torch.full((1, 3), -INF), torch.zeros(3, 1)).item() == -1


@pytest.mark.parametrize("reverse", [False, True], ids=["prefix", "suffix"])
def test_scan_is_repeated_log_matmul(reverse: bool) -> None:
    t = torch.randn(2, 12, 4, 4)
    products = [t[:, -1 if reverse else 0]]
    for i in range(1, 12):
        step = t[:, -1 - i] if reverse else t[:, i]
        pair = (step, products[-1]) if reverse else (products[-1], step)
        products.append(ops.log_matmul(*pair))
    want = torch.stack(products[::-1] if reverse else products, 1)
    torch.testing.assert_close(ops.log_scan(t, return_all=True, reverse=reverse), want)
    torch.testing.assert_close(ops.log_scan(t, reverse=reverse), products[-1])


def test_scan_of_nothing() -> None:
    assert ops.log_scan(torch.empty(0, 3, 3), torch.arange(3.0)).tolist() == [0.0, 1.0, 2.0]
    identity = ops.log_scan(torch.empty(0, 2, 2))
    assert identity.tolist() == [[0.0, -INF], [-INF, 0.0]]


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_convolution_in_many_digits(scale: float) -> None:
    """Against integer arithmetic: exponents on a grid, so that every bin is exact."""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, generator=g) * scale for n in (6, 9))
    c = ops.log_conv(a, b)
    for t in range(14):
        pairs = range(max(0, t - 8), min(5, t) + 1)
        terms = torch.stack([a[i].double() + b[t - i].double() for i in pairs])
        want = torch.logsumexp(terms, 0)
        assert abs(c[t] - want) <= 1e-6 * abs(want) + 1e-6


EQUATIONS = [
    "ab,bc->ac", "ab,bc,cd->ad", "abc,cd,b->da", "aab,b->a", "ab,ab->", "a,b->ab", "abc->b",
    "...a,ab->...b", "ab,b,b,a->b", "ab,bc,cd,de,ea->", "a,ab,abc,c,d->db",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = {c: int(torch.randint(1, 6, (), generator=g)) for c in "abcde"}
    operands = []
    for labels in equation.split("->")[0].split(","):
        lead = [2, 3] if "..." in labels else []
        shape = [*lead, *(sizes[c] for c in labels.replace("...", ""))]
        operands.append(torch.randn(shape, generator=g, dtype=torch.float64))
    want = torch.einsum(equation, *(o.exp() for o in operands)).log()
    torch.testing.assert_close(ops.log_einsum(equation, *operands), want)
    cold = ops.log_einsum(equation, *(400 * o for o in operands)) / 400
    hot = ops.log_einsum(equation, *operands, semiring="max")
    torch.testing.assert_close(hot, cold, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: ops.log_matmul(torch.ones(2, 64), torch.ones(63, 3)),
            ValueError,
            "sapwood.log_matmul: b must have size(-2) == a.size(-1) == 64, got 63",
        ),
        (
            lambda: ops.log_matmul(torch.ones(2, 2), torch.ones(2, 2), method="fast"),
            ValueError,
            "sapwood.log_matmul: method must be one of auto, exact, got 'fast'",
        ),
        (
            lambda: ops.log_scan(torch.ones(2, 3, 4)),
            ValueError,
            "sapwood.log_scan: t must have shape (..., L, k, k), got (2, 3, 4)",
        ),
        (
            lambda: ops.segment_logsumexp(torch.ones(2)),
            ValueError,
            "sapwood.segment_logsumexp: exactly one of index, ptr and plan must be given, "
            "got none of them",
        ),
        (
            lambda: ops.SegmentPlan(torch.tensor([0, 5]), 3),
            ValueError,
            "sapwood.SegmentPlan: index must lie in [0, 3), got values from 0 to 5",
        ),
        (
            lambda: ops.segment_logsumexp(torch.ones(3), ptr=torch.tensor([0, 2])),
            ValueError,
            "sapwood.segment_logsumexp: ptr must cover x.size(0) = 3 entries, got 2",
        ),
        (
            lambda: ops.log_conv(torch.ones(0), torch.ones(2)),
            ValueError,
            "sapwood.log_conv: a must have a last dimension of at least 1, got (0,)",
        ),
        (
            lambda: ops.log_einsum("ab,bc->ax", torch.ones(2, 2), torch.ones(2, 2)),
            ValueError,
            "sapwood.log_einsum: equation must have each output subscript once, and in an input, "
            "got 'ax'",
        ),
    ],
    ids=lambda v: "" if not isinstance(v, str) else v.split(":")[0],
)
def test_errors(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
