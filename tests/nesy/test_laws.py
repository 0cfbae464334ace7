"""Laws: of the monads, of the logics they give, and those that must not hold."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sapwood import nesy
from sapwood.nesy.monads import FiniteMonad, Monad

INSTANCES = 200
FINITE = {
    "Powerset": nesy.Powerset,
    "Dist": nesy.Dist,
    "Dist of fractions": nesy.Dist(number=Fraction),
    "Tens": nesy.Tens,
    "LogTens": nesy.LogTens,
    "MaxPlus": nesy.MaxPlus,
    "GiryQuadrature": nesy.GiryQuadrature,
}


def same(first: Any, second: Any) -> bool:
    if not isinstance(first, nesy.monads.Weights):
        return bool(first == second)
    return first.keys() == second.keys() and all(
        math.isclose(float(first[v]), float(second[v]), rel_tol=1e-12, abs_tol=1e-14) for v in first
    )


def random_value(monad: FiniteMonad, rng: random.Random) -> Any:
    values = rng.sample(range(6), rng.randint(1, 4))
    weights = [Fraction(rng.randint(0, 5), 1) for _ in values]
    weights[0] += 1
    if not monad.guards:
        weights = [w / sum(weights) for w in weights]
    return monad.from_probabilities(values, weights)


def random_kernel(monad: FiniteMonad, rng: random.Random) -> Callable[[int], Any]:
    results = [random_value(monad, rng) for _ in range(6)]
    return lambda a: results[a % 6]


def check_finite_laws(monad: FiniteMonad, rng: random.Random) -> None:
    m, other = random_value(monad, rng), random_value(monad, rng)
    f, g = random_kernel(monad, rng), random_kernel(monad, rng)
    a = rng.randrange(6)
    assert same(monad.bind(monad.unit(a), f), f(a))
    assert same(monad.bind(m, monad.unit), m)
    assert same(monad.bind(monad.bind(m, f), g), monad.bind(m, lambda x: monad.bind(f(x), g)))
    assert same(
        monad.bind(m, lambda x: monad.bind(other, lambda y: monad.unit((x, y)))),
        monad.bind(other, lambda y: monad.bind(m, lambda x: monad.unit((x, y)))),
    )


@pytest.mark.parametrize("name", FINITE)
def test_laws_of_finite_monads(name: str) -> None:
    monad, rng = FINITE[name], random.Random(0)
    for _ in range(INSTANCES):
        check_finite_laws(monad, rng)


def check_identity_laws(rng: random.Random) -> None:
    a, b, c = (rng.randrange(100) for _ in range(3))
    f, g = (lambda x, b=b: x * b), (lambda x, c=c: x + c)
    monad = nesy.Identity
    assert monad.bind(monad.unit(a), f) == f(a)
    assert monad.bind(a, monad.unit) == a
    assert monad.bind(monad.bind(a, f), g) == monad.bind(a, lambda x: monad.bind(f(x), g))


def test_laws_of_identity() -> None:
    rng = random.Random(1)
    for _ in range(INSTANCES):
        check_identity_laws(rng)


def by_row(kernels: list[Callable[[int], Any]]) -> Callable[[int], Callable[[int], Any]]:
    return lambda a: lambda row: kernels[row](a)


def check_batch_laws(batch: Monad, monad: FiniteMonad, rng: random.Random) -> None:
    rows = range(3)
    ms = [random_value(monad, rng) for _ in rows]
    fs, gs = ([random_kernel(monad, rng) for _ in rows] for _ in range(2))
    m = ms.__getitem__
    f, g = by_row(fs), by_row(gs)
    bound, nested = (
        batch.bind(batch.bind(m, f), g),
        batch.bind(m, lambda x: batch.bind(f(x), g)),
    )
    for row in rows:
        assert same(batch.bind(m, f)(row), monad.bind(ms[row], fs[row]))
        assert same(bound(row), nested(row))
        assert same(batch.bind(batch.unit(4), f)(row), fs[row](4))
        assert same(batch.bind(m, batch.unit)(row), ms[row])


@pytest.mark.parametrize("inner", ["Powerset", "Tens", "LogTens", "MaxPlus"])
def test_laws_of_batches(inner: str) -> None:
    """A row of a batched bind is the bind of the row: the row map is a morphism of monads."""
    monad, rng = FINITE[inner], random.Random(2)
    batch: Monad = nesy.Batch(monad)
    for _ in range(INSTANCES):
        check_batch_laws(batch, monad, rng)


def check_sampler_laws(seed: int, rng: random.Random) -> None:
    monad = nesy.GirySampler
    tables = [[rng.random() + 0.1 for _ in range(4)] for _ in range(8)]
    draw = [monad.from_probabilities(range(4), t) for t in tables]
    m, f, g = draw[0], (lambda a: draw[1 + a % 3]), (lambda a: draw[4 + a % 4])

    def run(value: Any, seed: int = seed) -> Any:
        return value(np.random.default_rng(seed))

    assert run(monad.bind(monad.unit(2), f)) == run(f(2))
    assert run(monad.bind(m, monad.unit)) == run(m)
    assert run(monad.bind(monad.bind(m, f), g)) == run(monad.bind(m, lambda x: monad.bind(f(x), g)))


def test_laws_of_the_sampler() -> None:
    """With equal generators both sides draw the same; commuting binds agree in distribution."""
    rng, monad = random.Random(3), nesy.GirySampler
    for seed in range(INSTANCES):
        check_sampler_laws(seed, rng)
    draw = [
        monad.from_probabilities(range(4), [rng.random() + 0.1 for _ in range(4)]) for _ in "ab"
    ]
    generator = np.random.default_rng(0)
    first = monad.bind(draw[0], lambda a: monad.bind(draw[1], lambda b: monad.unit((a, b))))
    second = monad.bind(draw[1], lambda b: monad.bind(draw[0], lambda a: monad.unit((a, b))))
    counts = np.zeros((2, 4, 4))
    for _ in range(4000):
        counts[0][first(generator)] += 1
        counts[1][second(generator)] += 1
    mean = counts.sum(0) / 2
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert statistic < 37.7  # chi-square with 15 degrees of freedom, p = 1e-3


def check_logarithm(rng: random.Random) -> None:
    values = rng.sample(range(6), 4)
    weights = [rng.random() for _ in values]
    kernels = {a: (rng.sample(range(6), 3), [rng.random() for _ in range(3)]) for a in range(6)}
    plain = nesy.Tens.bind(
        nesy.Tens.from_probabilities(values, weights),
        lambda a: nesy.Tens.from_probabilities(*kernels[a]),
    )
    logs = nesy.LogTens.bind(
        nesy.LogTens.from_probabilities(values, weights),
        lambda a: nesy.LogTens.from_probabilities(*kernels[a]),
    )
    assert plain.keys() == logs.keys()
    assert all(math.isclose(math.log(plain[v]), logs[v], abs_tol=1e-12) for v in plain)


def test_logarithm_is_an_isomorphism() -> None:
    rng = random.Random(4)
    for _ in range(INSTANCES):
        check_logarithm(rng)


def test_encoding_and_decoding() -> None:
    """dec(enc(p)) = p; enc(dec(a)) is not a but its normalised form."""
    a = torch.randn(5, dtype=torch.float64)
    p = a.softmax(0)
    torch.testing.assert_close(p.log().softmax(0), p)
    torch.testing.assert_close(a.softmax(0).log(), a.log_softmax(0))
    assert not torch.allclose(a.softmax(0).log(), a)


def test_dist_is_over_no_semiring() -> None:
    """1/2 * (1/2 (+) 1/2) with p + q - pq as a sum is 3/8, not 7/16: no distributivity."""
    half = Fraction(1, 2)
    plus = nesy.Product.disjunction
    assert half * plus(half, half) == Fraction(3, 8)
    assert plus(half * half, half * half) == Fraction(7, 16)


def lifted(name: str, *ps: Fraction) -> Any:
    """A connective of independent formulas, in Dist."""
    monad = nesy.Dist(number=Fraction)
    draws = [monad.from_probabilities([True, False], [p, 1 - p]) for p in ps]

    def collect(seen: tuple[bool, ...]) -> Any:
        if len(seen) == len(draws):
            return monad.unit(getattr(nesy.Bool, name)(*seen))
        return monad.bind(draws[len(seen)], lambda a: collect((*seen, a)))

    return collect(()).get(True, Fraction(0))


def test_lifted_connectives_are_the_product_logic() -> None:
    rng = random.Random(5)
    for _ in range(INSTANCES):
        p, q, r = (Fraction(rng.randint(1, 9), 10) for _ in range(3))
        conj, disj, neg = (
            getattr(nesy.Product, n) for n in ("conjunction", "disjunction", "negate")
        )
        assert lifted("conjunction", p, q) == p * q
        assert lifted("disjunction", p, q) == p + q - p * q
        assert lifted("negate", p) == 1 - p
        assert conj(conj(p, q), r) == conj(p, conj(q, r))
        assert disj(disj(p, q), r) == disj(p, disj(q, r))
        assert conj(p, q) == conj(q, p)
        assert conj(p, 1) == p == disj(p, 0)
        assert neg(conj(p, q)) == disj(neg(p), neg(q))


def test_laws_that_copy_fail() -> None:
    """Idempotence, absorption and distributivity use a formula twice; binding it twice does not."""
    p, q, r = Fraction(1, 2), Fraction(1, 3), Fraction(1, 5)
    conj, disj = (lambda *a: lifted("conjunction", *a)), (lambda *a: lifted("disjunction", *a))
    assert conj(p, p) == p * p != p
    assert conj(p, disj(p, q)) != p
    assert conj(p, disj(q, r)) != disj(conj(p, q), conj(p, r))


def test_log_coordinates() -> None:
    """(against, for) pairs of log masses: the formulas of the spec equal the lifted connectives."""
    a, b = torch.randn(2, 2, dtype=torch.float64).unbind(0)
    weights = [nesy.LogTens.from_logs([False, True], m.tolist()) for m in (a, b)]

    def combine(call: Callable[[bool, bool], bool]) -> tuple[float, float]:
        found = nesy.LogTens.bind(
            weights[0],
            lambda x: nesy.LogTens.bind(weights[1], lambda y: nesy.LogTens.unit(call(x, y))),
        )
        return found[False], found[True]

    lse = torch.logsumexp
    both = (lse(torch.stack([a[0] + b[0], a[0] + b[1], a[1] + b[0]]), 0), a[1] + b[1])
    either = (a[0] + b[0], lse(torch.stack([a[0] + b[1], a[1] + b[0], a[1] + b[1]]), 0))
    assert combine(lambda x, y: x and y) == pytest.approx([float(v) for v in both], rel=1e-12)
    assert combine(lambda x, y: x or y) == pytest.approx([float(v) for v in either], rel=1e-12)
    log_truth = a[1] - lse(a, 0)
    torch.testing.assert_close(-log_truth, torch.nn.functional.softplus(a[0] - a[1]))
