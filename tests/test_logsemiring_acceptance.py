"""Chains, paths, convolutions, contractions and segments against brute force and many digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood import ops
from sapwood.ops.logsemiring import _einsum

INF = math.inf


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestManyDigits:
    """float64 against 50 digits, convolutions against 60."""

    @pytest.mark.parametrize("method", ["auto", "exact"])
    @pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1e4])
    def test_log_matmul(self, scale: float, method: str) -> None:
        mpmath = pytest.importorskip("mpmath")
        a, b = (torch.randn(8, 8, generator=seeded(i), dtype=torch.float64) * scale for i in (1, 2))
        c = ops.log_matmul(a, b, method=method)
        with mpmath.workdps(50):
            for i, j in itertools.product(range(8), repeat=2):
                terms = [mpmath.exp(mpmath.mpf(x) + mpmath.mpf(y))
                         for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]  # fmt: skip
                want = mpmath.log(mpmath.fsum(terms))
                assert abs(c[i, j].item() - want) <= 1e-12 + 2**-50 * abs(want)

    def test_certified_product(self) -> None:
        """Large enough for the product of exponentials, in double."""
        mpmath = pytest.importorskip("mpmath")
        a, b = (torch.randn(s, generator=seeded(3), dtype=torch.float64) * 30 for s in
                ((40, 20), (20, 40)))  # fmt: skip
        c = ops.log_matmul(a, b)
        with mpmath.workdps(50):
            for i, j in itertools.product(range(0, 40, 7), repeat=2):
                terms = [mpmath.exp(mpmath.mpf(x) + mpmath.mpf(y))
                         for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]  # fmt: skip
                want = mpmath.log(mpmath.fsum(terms))
                assert abs(c[i, j].item() - want) <= 1e-12 + 2**-50 * abs(want)

    @pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
    def test_log_conv(self, scale: float) -> None:
        mpmath = pytest.importorskip("mpmath")
        a, b = (torch.randn(n, generator=seeded(n)) * scale for n in (6, 9))
        c = ops.log_conv(a, b)
        with mpmath.workdps(60):
            p, q = ([mpmath.exp(mpmath.mpf(v)) for v in x.tolist()] for x in (a, b))
            for t in range(14):
                pairs = range(max(0, t - 8), min(5, t) + 1)
                want = mpmath.log(mpmath.fsum(p[i] * q[t - i] for i in pairs))
                assert abs(c[t].item() - want) <= 1e-6 * abs(want) + 1e-6


def paths_of(t: Tensor, init: Tensor, final: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every path of one chain (L, k, k), and its weight in float64."""
    length, k = t.shape[:2]
    t, init, final = t.double(), init.double(), final.double()
    every = list(itertools.product(range(k), repeat=length + 1))
    weights = [
        init[p[0]] + final[p[-1]] + sum(t[i, p[i], p[i + 1]] for i in range(length)) for p in every
    ]
    return every, torch.stack(weights)


class TestChains:
    @pytest.mark.parametrize("semiring", ["log", "max"])
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("length", [5, 32, 100, 160])
    def test_parallel_is_sequential(self, length: int, reverse: bool, semiring: str) -> None:
        g = seeded(length)
        t, init = torch.randn(2, length, 3, 3, generator=g), torch.randn(2, 3, generator=g)
        t[0, length // 2, 1] = -INF
        for start, every in itertools.product((None, init), (False, True)):
            results = [
                ops.log_scan(t, start, return_all=every, reverse=reverse, semiring=semiring,
                             method=method)
                for method in ("sequential", "parallel", "auto")
            ]  # fmt: skip
            for other in results[1:]:
                torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)

    def test_one_long_chain_is_split(self) -> None:
        t, init = torch.randn(5000, 2, 2, generator=seeded(13)), torch.zeros(2)
        every = [ops.log_scan(t, init, method=m) for m in ("auto", "parallel", "sequential")]
        assert torch.equal(every[0], every[1])
        torch.testing.assert_close(every[0], every[2], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("semiring", ["log", "max"])
    def test_gradients_of_the_parallel_form(self, semiring: str) -> None:
        g = seeded(1)
        t, init = torch.randn(1, 150, 3, 3, generator=g), torch.randn(1, 3, generator=g)
        grads = []
        for method in ("sequential", "parallel"):
            x, y = t.clone().requires_grad_(), init.clone().requires_grad_()
            states = ops.log_scan(x, y, return_all=True, semiring=semiring, method=method)
            grads.append(torch.autograd.grad(states.sin().sum(), (x, y)))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_max_is_the_cold_limit(self) -> None:
        t, init = torch.randn(2, 9, 4, 4, generator=seeded(2)).double(), torch.zeros(2, 4).double()
        cold = ops.log_scan(200 * t, 200 * init, return_all=True) / 200
        hot = ops.log_scan(t, init, return_all=True, semiring="max")
        assert ((cold - hot).abs() <= 10 * math.log(4) / 200).all()

    def test_max_of_nothing(self) -> None:
        y = ops.log_scan(torch.empty(0, 2, 2), torch.tensor([1.0, -INF]), semiring="max")
        assert y.tolist() == [1.0, -INF]


class TestPaths:
    @pytest.mark.parametrize("ended", [False, True])
    @pytest.mark.parametrize(("length", "k"), [(0, 3), (1, 2), (4, 3), (6, 3), (6, 1)])
    def test_best_path_is_that_of_brute_force(self, length: int, k: int, ended: bool) -> None:
        g = seeded(10 * length + k)
        t, init = torch.randn(3, length, k, k, generator=g), torch.randn(3, k, generator=g)
        final = torch.randn(3, k, generator=g) if ended else torch.zeros(3, k)
        value, path = ops.log_scan_argmax(t, init, final if ended else None)
        for i in range(3):
            every, weights = paths_of(t[i], init[i], final[i])
            assert tuple(path[i].tolist()) == every[int(weights.argmax())]
            assert abs(value[i] - weights.max()) < 1e-5

    def test_gradient_is_the_path(self) -> None:
        t, init = torch.randn(5, 3, 3, generator=seeded(4)), torch.randn(3, generator=seeded(5))
        t.requires_grad_(), init.requires_grad_()
        value, path = ops.log_scan_argmax(t, init)
        dt, dinit = torch.autograd.grad(value, (t, init))
        want = torch.zeros(5, 3, 3)
        want[torch.arange(5), path[:-1], path[1:]] = 1
        assert torch.equal(dt, want)
        assert torch.equal(dinit, torch.nn.functional.one_hot(path[0], 3).float())

    def test_ties_give_the_lowest_states(self) -> None:
        value, path = ops.log_scan_argmax(torch.zeros(4, 3, 3), torch.zeros(3))
        assert path.tolist() == [0] * 5
        assert value == 0

    def test_no_path(self) -> None:
        t = torch.zeros(2, 3, 2, 2)
        t[1, 1] = -INF
        value, path = ops.log_scan_argmax(t, torch.zeros(2, 2))
        assert value.tolist() == [0.0, -INF]
        assert path[1].eq(-1).all()
        drawn = ops.log_scan_sample(t, torch.zeros(2, 2), num_samples=5)
        assert drawn.shape == (5, 2, 4)
        assert drawn[:, 1].eq(-1).all()
        assert drawn[:, 0].ge(0).all()

    @pytest.mark.parametrize("ended", [False, True])
    def test_draws_follow_the_distribution_of_paths(self, ended: bool) -> None:
        """Chi-square against all 81 paths, at 1e5 draws."""
        scipy_stats = pytest.importorskip("scipy.stats")
        g = seeded(6)
        t, init = torch.randn(3, 3, 3, generator=g), torch.randn(3, generator=g)
        final = torch.randn(3, generator=g) if ended else None
        drawn = ops.log_scan_sample(t, init, final, num_samples=100_000, generator=g)
        every, weights = paths_of(t, init, torch.zeros(3) if final is None else final)
        expected = torch.softmax(weights, 0) * 100_000
        code = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
        counts = code.bincount(minlength=len(every)).double()
        assert scipy_stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3

    def test_draws_do_not_depend_on_threads(self, threads: None) -> None:
        t, init = torch.randn(4, 20, 5, 5, generator=seeded(7)), torch.zeros(4, 5)
        drawn = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            drawn.append(ops.log_scan_sample(t, init, num_samples=9, generator=seeded(8)))
        assert all(torch.equal(d, drawn[0]) for d in drawn)

    def test_batches_broadcast(self) -> None:
        t, init = torch.randn(2, 1, 6, 3, 3), torch.randn(4, 3)
        value, path = ops.log_scan_argmax(t, init, torch.randn(3))
        assert value.shape == (2, 4)
        assert path.shape == (2, 4, 7)
        assert ops.log_scan_sample(t, init).shape == (2, 4, 7)


class TestSegmentSoftmax:
    def test_sums_to_one_where_there_is_mass(self) -> None:
        x = torch.randn(3, 60, 2, generator=seeded(12), dtype=torch.float64)
        x[:, ::7] = -INF
        index = torch.arange(60) % 7
        p = ops.segment_softmax(x, index, num_segments=9, dim=1)
        total = torch.zeros(3, 9, 2, dtype=torch.float64).index_add(1, index, p)
        want = torch.tensor([0.0] + [1.0] * 6 + [0.0] * 2, dtype=torch.float64)
        torch.testing.assert_close(total, want[:, None].expand(3, 9, 2))
        log_p = x - ops.segment_logsumexp(x, index, num_segments=9, dim=1)[:, index]
        torch.testing.assert_close(p, log_p.exp().nan_to_num(0.0))

    def test_infinities(self) -> None:
        x = torch.tensor([INF, 1.0, INF, math.nan, 2.0, -INF])
        p = ops.segment_softmax(x, torch.tensor([0, 0, 0, 1, 1, 2]))
        want = torch.tensor([0.5, 0.0, 0.5, math.nan, math.nan, 0.0])
        torch.testing.assert_close(p, want, equal_nan=True)


class TestSegmentMax:
    def test_values_indices_and_gradient(self) -> None:
        x = torch.tensor([1.0, 5.0, -INF, 5.0, math.nan, 2.0], requires_grad=True)
        values, indices = ops.segment_max(x, torch.tensor([0, 0, 1, 0, 3, 3]), num_segments=5)
        torch.testing.assert_close(
            values.detach(), torch.tensor([5.0, -INF, -INF, math.nan, -INF]), equal_nan=True
        )
        assert indices.tolist() == [1, -1, -1, 4, -1]
        (grad,) = torch.autograd.grad(values[:3].sum(), x)
        assert grad.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]

    def test_is_the_cold_limit_of_the_sum(self) -> None:
        x = torch.randn(4, 60, 3, generator=seeded(9), dtype=torch.float64)
        index = torch.randint(7, (60,), generator=seeded(10))
        plan = ops.SegmentPlan(index, 7)
        cold = ops.segment_logsumexp(500 * x, plan=plan, dim=1) / 500
        values, indices = ops.segment_max(x, plan=plan, dim=1)
        assert ((cold - values).abs() <= math.log(60) / 500).all()
        assert torch.equal(x.gather(1, indices), values)
        assert (index[indices] == torch.arange(7)[:, None]).all()


def random_equation(g: torch.Generator) -> tuple[list[str], str]:
    count = int(torch.randint(2, 6, (), generator=g))
    letters = "abcdef"
    inputs = []
    for _ in range(count):
        rank = int(torch.randint(1, 4, (), generator=g))
        picks = torch.randperm(len(letters), generator=g)[:rank].tolist()
        inputs.append("".join(letters[i] for i in picks))
    used = sorted(set("".join(inputs)))
    output = "".join(c for c in used if torch.rand((), generator=g) < 0.3)
    return inputs, output


def peaks(inputs: Sequence[frozenset[str]], output: frozenset[str], sizes: dict[str, int]) -> int:
    """The smallest largest intermediate over every order of pairs, by recursion."""
    if len(inputs) == 1:
        return 0
    best = 2**62
    for i, j in itertools.combinations(range(len(inputs)), 2):
        rest = [s for n, s in enumerate(inputs) if n not in (i, j)]
        kept = (inputs[i] | inputs[j]) & output.union(*rest)
        size = math.prod(sizes[c] for c in kept)
        best = min(best, max(size, peaks([*rest, kept], output, sizes)))
    return best


@pytest.fixture
def intermediates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what each contraction of log_einsum returns."""
    seen: list[int] = []
    contract = _einsum._contract

    def watched(*args: Any) -> Any:
        result = contract(*args)
        seen.append(result[0].numel())
        return result

    monkeypatch.setattr(_einsum, "_contract", watched)
    return seen


def test_fifty_random_contractions(intermediates: list[int]) -> None:
    """Values of float64 brute force, and no intermediate twice the best order's largest."""
    g = seeded(11)
    for _ in range(50):
        inputs, output = random_equation(g)
        sizes = {c: int(torch.randint(1, 6, (), generator=g)) for c in "abcdef"}
        operands = [
            torch.randn([sizes[c] for c in labels], generator=g, dtype=torch.float64) * 3
            for labels in inputs
        ]
        intermediates.clear()
        got = ops.log_einsum(f"{','.join(inputs)}->{output}", *operands)
        every = sorted(set("".join(inputs)))
        joint: Tensor = torch.zeros([sizes[c] for c in every], dtype=torch.float64)
        for labels, value in zip(inputs, operands, strict=True):
            order = sorted(range(len(labels)), key=lambda i, labels=labels: labels[i])  # type: ignore[misc]
            shape = [sizes[c] if c in labels else 1 for c in every]
            joint = joint + value.permute(order).reshape(shape)
        gone = [i for i, c in enumerate(every) if c not in output]
        want = torch.logsumexp(joint, gone) if gone else joint
        torch.testing.assert_close(got, want)
        sets = [frozenset(labels) for labels in inputs]
        assert max(intermediates) <= 2 * peaks(sets, frozenset(output), sizes)


ERRORS = [
    (
        lambda: ops.log_scan(torch.ones(2, 3, 3), semiring="sum"),
        ValueError,
        "sapwood.log_scan: semiring must be one of log, max, got 'sum'",
    ),
    (
        lambda: ops.log_scan(torch.ones(2, 3, 3), method="fast"),
        ValueError,
        "sapwood.log_scan: method must be one of auto, sequential, parallel, got 'fast'",
    ),
    (
        lambda: ops.log_scan(torch.ones(2, 3, 3), torch.ones(4)),
        ValueError,
        "sapwood.log_scan: init must have a last dimension of 3, got (4,)",
    ),
    (
        lambda: ops.log_scan_argmax(torch.ones(2, 3, 4), torch.ones(3)),
        ValueError,
        "sapwood.log_scan_argmax: t must have shape (..., L, k, k), got (2, 3, 4)",
    ),
    (
        lambda: ops.log_scan_argmax(torch.ones(2, 3, 3), torch.ones(3), torch.ones(2)),
        ValueError,
        "sapwood.log_scan_argmax: final must broadcast to (3,), got (2,)",
    ),
    (
        lambda: ops.log_scan_argmax(torch.ones(2, 3, 3), None),
        TypeError,
        "sapwood.log_scan_argmax: init must be a tensor, got NoneType",
    ),
    (
        lambda: ops.log_scan_sample(torch.ones(2, 3, 3), torch.ones(3), num_samples=-1),
        ValueError,
        "sapwood.log_scan_sample: num_samples must be at least 0, got -1",
    ),
    (
        lambda: ops.segment_max(torch.ones(2)),
        ValueError,
        "sapwood.segment_max: exactly one of index, ptr and plan must be given, got none of them",
    ),
    (
        lambda: ops.segment_max(torch.ones(3), ptr=torch.tensor([0, 2])),
        ValueError,
        "sapwood.segment_max: ptr must cover x.size(0) = 3 entries, got 2",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=[e[2][8:40] for e in ERRORS])
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
