"""Defects that other log-semiring libraries have or had, each as a test of ours.

The numbers are those of the public reports: torch_scatter #368 #407 #444 and pull request 426,
pytorch #31829 #49724, jax #6811, cirkit #416, genbmm #12, torch-semiring-einsum #3, k2 #944.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sapwood import ops

INF = math.inf


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


class TestSegments:
    """The torch_scatter list."""

    def test_untouched_segment_is_minus_infinity(self) -> None:  # 368
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        y = ops.segment_logsumexp(x, torch.tensor([0, 2]), num_segments=4)
        assert y.tolist() == [1.0, -INF, 2.0, -INF]
        assert gradient(y[:3], x).tolist() == [1.0, 1.0]

    def test_segment_of_minus_infinity(self) -> None:  # 407
        x = torch.tensor([-INF, -INF, 3.0], requires_grad=True)
        y = ops.segment_logsumexp(x, torch.tensor([0, 0, 1]))
        assert y.tolist() == [-INF, 3.0]
        assert gradient(y, x).tolist() == [0.0, 0.0, 1.0]

    def test_nan_is_not_hidden(self) -> None:  # 444
        x = torch.tensor([math.nan, 1.0, 2.0, -INF], requires_grad=True)
        y = ops.segment_logsumexp(x, torch.tensor([0, 0, 1, 1]))
        assert y[0].isnan()
        assert y[1] == 2.0
        assert gradient(y, x).isnan().tolist() == [True, True, False, False]

    def test_gradients_with_minus_infinity_beside_finite_terms(self) -> None:  # pull request 426
        x = torch.tensor([-INF, 0.0, 0.0, 5.0], requires_grad=True)
        y = ops.segment_logsumexp(x, torch.tensor([1, 1, 1, 0]))
        assert gradient(y, x).tolist() == [0.0, 0.5, 0.5, 1.0]

    def test_no_entries_at_all(self) -> None:
        y = ops.segment_logsumexp(torch.empty(0), torch.empty(0, dtype=torch.long), num_segments=3)
        assert y.tolist() == [-INF] * 3

    def test_plus_infinity(self) -> None:
        x = torch.tensor([INF, 1.0, INF, 2.0], requires_grad=True)
        y = ops.segment_logsumexp(x, torch.tensor([0, 0, 0, 1]))
        assert y.tolist() == [INF, 2.0]
        assert gradient(y, x).tolist() == [0.5, 0.0, 0.5, 1.0]

    def test_unsorted_equals_sorted(self) -> None:
        x, index = torch.randn(50, 3), torch.randint(5, (50,))
        order = index.argsort(stable=True)
        a = ops.segment_logsumexp(x, index, dim=0, num_segments=5)
        b = ops.segment_logsumexp(x[order], index[order], dim=0, num_segments=5)
        assert torch.equal(a, b)


class TestEmptyMass:
    """pytorch 31829 and 49724, jax 6811: no mass gives a NaN gradient there."""

    def test_logsumexp(self) -> None:
        x = torch.full((2, 3), -INF, requires_grad=True)
        y = ops.logsumexp(x, 1)
        assert y.tolist() == [-INF, -INF]
        assert gradient(y, x).eq(0).all()
        assert gradient(torch.logsumexp(x, 1), x).isnan().all()  # torch's defect is still there

    def test_logsumexp_of_one_empty_row(self) -> None:
        x = torch.tensor([[-INF, -INF], [0.0, -INF]], requires_grad=True)
        assert gradient(ops.logsumexp(x, 1), x).tolist() == [[0.0, 0.0], [1.0, 0.0]]

    def test_logaddexp(self) -> None:
        a = torch.tensor([-INF, -INF, 1.0], requires_grad=True)
        b = torch.tensor([-INF, 2.0, -INF], requires_grad=True)
        y = ops.logaddexp(a, b)
        assert y.tolist() == [-INF, 2.0, 1.0]
        assert gradient(y, a).tolist() == [0.0, 0.0, 1.0]
        assert gradient(y, b).tolist() == [0.0, 1.0, 0.0]

    def test_second_derivatives_are_finite(self) -> None:
        x = torch.tensor([-INF, -INF], requires_grad=True)
        (first,) = torch.autograd.grad(ops.logsumexp(x, 0), x, create_graph=True)
        assert gradient(first, x).eq(0).all()

    def test_log_normalize_keeps_an_empty_row(self) -> None:
        y = ops.log_normalize(torch.tensor([[-INF, -INF], [0.0, -INF]]))
        assert y.tolist() == [[-INF, -INF], [0.0, -INF]]

    def test_plus_infinity_is_shared(self) -> None:
        x = torch.tensor([INF, 0.0, INF], requires_grad=True)
        assert gradient(ops.logsumexp(x, 0), x).tolist() == [0.5, 0.0, 0.5]
        a = torch.tensor(INF, requires_grad=True)
        assert gradient(ops.logaddexp(a, torch.tensor(INF)), a) == 0.5


class TestSmallLikelihoods:
    """cirkit 416: log-likelihoods stuck at the smallest double, -708.4."""

    @pytest.mark.parametrize("level", [-709.0, -1e4, -2e5])
    @pytest.mark.parametrize("method", ["auto", "exact"])
    def test_log_matmul(self, level: float, method: str) -> None:
        a, b = torch.full((30, 40), level), torch.zeros(40, 30)
        y = ops.log_matmul(a, b, method=method)
        torch.testing.assert_close(y, torch.full_like(y, level + math.log(40)))

    def test_product_of_many(self) -> None:
        steps = torch.full((3000, 2, 2), -100.0)
        y = ops.log_scan(steps, torch.zeros(2))
        torch.testing.assert_close(y, torch.full((2,), 3000 * (-100 + math.log(2))))


def test_one_maximum_per_row_loses_bins() -> None:
    """The maximum must be that of the reduced terms, not of a row."""
    a = torch.tensor([[0.0, -500.0]])
    b = torch.tensor([[-INF, 0.0], [0.0, -INF]])
    assert ops.log_matmul(a, b).tolist() == [[-500.0, 0.0]]


def test_tails_of_a_convolution() -> None:
    """An FFT is right to 1e-7 of the peak; these bins lie 200 nats and more below it."""
    a = torch.tensor([0.0, -100.0, -300.0])
    y = ops.log_conv(a, a)
    want = [0.0, -100.0 + math.log(2), -200.0, -400.0 + math.log(2), -600.0]
    torch.testing.assert_close(y, torch.tensor(want))


def test_sentinels_are_not_needed() -> None:
    """-1e9 for "impossible" overflows when summed; -inf does not."""
    t = torch.zeros(4, 2, 2)
    t[:, 0, 1] = -INF
    t.requires_grad_()
    y = ops.log_scan(t, torch.tensor([0.0, -INF]))
    assert y.tolist() == [0.0, -INF]
    grad = gradient(y[0], t)
    assert grad.isfinite().all()
    assert grad[:, 0, 1].eq(0).all()


def test_very_many_small_problems() -> None:
    """genbmm 12: batches above 65 535."""
    a, b = torch.randn(100_000, 2, 2), torch.randn(100_000, 2, 2)
    y = ops.log_matmul(a, b)
    torch.testing.assert_close(y, torch.logsumexp(a[..., None] + b[:, None], 2))


def test_private_subscripts_are_summed_first() -> None:
    """torch-semiring-einsum 3: without it this table would have 10^18 entries."""
    xs = [torch.randn(1000) for _ in range(6)]
    y = ops.log_einsum("a,b,c,d,e,f->", *xs)
    torch.testing.assert_close(y, sum(torch.logsumexp(x, 0) for x in xs))


def test_a_long_chain_does_not_drift() -> None:
    """k2 944: ten thousand float32 factors; forward and backward totals agree to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(10_000, 8, 8, generator=generator)
    zero = torch.zeros(8)
    forward = ops.log_scan(t, zero, return_all=True)
    backward = ops.log_scan(t, zero, return_all=True, reverse=True)
    total = ops.logsumexp(forward[-1].double(), 0)
    for cut in range(0, 10_000 - 500, 500):
        at_cut = ops.logsumexp(forward[cut].double() + backward[cut + 1].double(), 0)
        assert abs(at_cut / total - 1) <= 1e-6
    assert abs(ops.logsumexp(backward[0].double(), 0) / total - 1) <= 1e-6


def test_integers_are_refused() -> None:
    message = r"^sapwood\.log_matmul: a must be floating point, got torch\.int64$"
    with pytest.raises(TypeError, match=message):
        ops.log_matmul(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2))


@pytest.mark.parametrize("k", [2, 5])
def test_chains_side_by_side_are_those_alone(k: int) -> None:
    """Infinities and NaN of one chain act in a batch as alone, and spoil no other chain."""
    batch = 11
    t, init = torch.randn(batch, 6, k, k), torch.randn(batch, 2, k)
    t[0, 1], t[10, 2, 0], t[1, 3, :, 0] = -INF, -INF, INF
    t[2, 4, 0, 1], t[3, 1, 0, 0], init[4, 1] = math.nan, INF, -INF
    t[5] *= 1e4
    states = torch.ops.sapwood.log_scan(t, init, False)
    grad = torch.randn_like(states)
    grad[..., 0] = 0
    got = (states, *torch.ops.sapwood.log_scan_backward(grad, t, states, False))
    alone = []
    for one, start, g in zip(t.split(1), init.split(1), grad.split(1), strict=True):
        s = torch.ops.sapwood.log_scan(one, start, False)
        alone.append((s, *torch.ops.sapwood.log_scan_backward(g, one, s, False)))
    for actual, parts in zip(got, zip(*alone, strict=True), strict=True):
        want = torch.cat(parts)
        torch.testing.assert_close(actual, want, equal_nan=True, rtol=1e-6, atol=1e-7)
