"""The same text under every monad and algebra, expected values written out."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import pytest
import torch

from sapwood import nesy
from sapwood.nesy import syntax as S
from sapwood.nesy.algebra import Algebra
from sapwood.nesy.monads import FiniteMonad

A, B = S.Var("a"), S.Var("b")
#: do { a <- rain; b <- wind(a); return (a & b) | ~a }: in words, rain only with wind
FORMULA = S.Do(
    ((A, S.App("rain")), (B, S.App("wind", (A,)))),
    S.Return((A & B) | ~A),
)
P_RAIN, P_WIND = 0.4, {True: 0.75, False: 0.1}


@nesy.do
def program() -> Generator[Any, Any, Any]:
    a = yield nesy.bernoulli(P_RAIN)
    b = yield nesy.bernoulli(nesy.table(P_WIND)[a])
    return (a & b) | ~a


def read(monad: FiniteMonad) -> Any:
    def two(p: float) -> Any:
        return monad.from_probabilities([True, False], [p, 1 - p])

    symbols = {"rain": lambda: two(P_RAIN), "wind": lambda a: two(P_WIND[a])}
    return S.truth(FORMULA, nesy.Interpretation(monad, nesy.Bool, symbols=symbols))


@pytest.mark.parametrize(
    ("monad", "expected"),
    [
        (nesy.Powerset, {True: True, False: True}),
        (nesy.Dist, {True: 0.9, False: 0.1}),
        (nesy.Tens, {True: 0.9, False: 0.1}),
        (nesy.LogTens, {True: math.log(0.9), False: math.log(0.1)}),
        (nesy.MaxPlus, {True: math.log(0.6 * 0.9), False: math.log(0.4 * 0.25)}),
        (nesy.GiryQuadrature, {True: 0.9, False: 0.1}),
    ],
)
def test_formula_in_a_monad(monad: FiniteMonad, expected: dict[bool, Any]) -> None:
    assert dict(read(monad)) == pytest.approx(expected, abs=1e-12)


def test_formula_sampled() -> None:
    import numpy as np

    draw = nesy.GirySampler.from_probabilities
    symbols = {
        "rain": lambda: draw([True, False], [P_RAIN, 1 - P_RAIN]),
        "wind": lambda a: draw([True, False], [P_WIND[a], 1 - P_WIND[a]]),
    }
    found = S.truth(FORMULA, nesy.Interpretation(nesy.GirySampler, nesy.Bool, symbols=symbols))
    rng = np.random.default_rng(0)
    share = sum(found(rng) for _ in range(4000)) / 4000
    assert abs(share - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 4000)


@pytest.mark.parametrize(
    ("algebra", "expected"),
    [
        (nesy.Bool, False),
        (nesy.LP, nesy.LPValue.BOTH),
        (nesy.Product, 1 - (1 - 0.6 * 0.3) * 0.6),
        (nesy.Godel, 0.4),
        (nesy.Lukasiewicz, 0.4),
    ],
)
def test_formula_in_an_algebra(algebra: Algebra, expected: Any) -> None:
    """The identity monad: rain to degree 0.6, wind to degree 0.3."""
    symbols = {
        "rain": lambda: algebra.from_degree(0.6),
        "wind": lambda a: algebra.from_degree(0.3),
    }
    found = S.truth(FORMULA, nesy.Interpretation(nesy.Identity, algebra, symbols=symbols))
    assert found == pytest.approx(expected, abs=1e-12)


def test_program_under_every_monad() -> None:
    assert program().truth(nesy.Powerset) == {True, False}
    assert program().truth(nesy.Dist).item() == pytest.approx(0.9, abs=1e-12)
    assert program().truth(nesy.Dist(number=Fraction)) == pytest.approx(0.9, abs=1e-12)
    assert program().truth(nesy.Tens).item() == pytest.approx(0.9, abs=1e-12)
    assert program().double().truth(nesy.LogTens).item() == pytest.approx(math.log(0.9))
    assert program().double().truth(nesy.MaxPlus).item() == pytest.approx(math.log(0.54))
    assert program().truth(nesy.GiryQuadrature).item() == pytest.approx(0.9, abs=1e-12)
    assert program().truth(nesy.Batch(nesy.Dist)).item() == pytest.approx(0.9, abs=1e-12)
    estimate = program().truth(nesy.GirySampler, num_samples=100_000, seed=0)
    assert abs(estimate.mean - 0.9) < 4 * estimate.stderr
    with pytest.raises(nesy.UnsupportedMonadError, match="Identity must have a distribution"):
        program().truth(nesy.Identity)


def test_program_with_guards_and_data_under_every_monad() -> None:
    """Two dice whose first is at least 3; the sum is observed: rows 4, 7 and 13."""
    n = torch.tensor([4, 7, 13])

    @nesy.do
    def dice() -> Generator[Any, Any, Any]:
        first = yield nesy.uniform(range(1, 7))
        yield nesy.guard(first >= 3)
        second = yield nesy.uniform(range(1, 7))
        return first + second == nesy.observed(n)

    mass = torch.tensor([1 / 36, 4 / 36, 0], dtype=torch.float64)
    torch.testing.assert_close(dice().truth(nesy.Tens), mass)
    torch.testing.assert_close(dice().truth(nesy.Dist), mass * 1.5)
    torch.testing.assert_close(dice().double().log_truth().exp(), mass)
    torch.testing.assert_close(dice().double().log_truth("evidence").exp(), mass * 1.5)
    assert dice().truth(nesy.Powerset) == [{True, False}, {True, False}, {False}]
    best = torch.tensor([1 / 36, 1 / 36, 0], dtype=torch.float64)
    torch.testing.assert_close(dice().double().truth(nesy.MaxPlus).exp(), best)
    estimate = dice().truth(nesy.GirySampler, num_samples=100_000, seed=1)
    assert bool(((estimate.mean - mass * 1.5).abs() <= 4 * estimate.stderr).all())
    assert [s == {True, False} for s in dice().truth(nesy.Batch(nesy.Powerset))] == [1, 1, 0]


@nesy.do
def bad_weather() -> Generator[Any, Any, Any]:
    humid = yield nesy.bernoulli(0.4)
    t = yield (nesy.normal(16.0, 3.0) if humid else nesy.normal(22.0, 4.0))
    return (humid & (t < 15)) | (~humid & (t > 25))


def test_weather_in_the_giry_monads() -> None:
    start = time.process_time()
    estimate = bad_weather().truth(nesy.GirySampler, num_samples=1_000_000, seed=0)
    assert time.process_time() - start <= 1.5
    assert abs(estimate.mean - 0.2837529475) < 4 * estimate.stderr
    assert estimate == bad_weather().truth(nesy.GirySampler, num_samples=1_000_000, seed=0)
    coarse = bad_weather().truth(nesy.GiryQuadrature, nodes=64).item()
    assert abs(coarse - 0.2837529475) < 0.05  # of order 1 / nodes for an indicator
    for monad in (nesy.Dist, nesy.LogTens, nesy.MaxPlus):
        with pytest.raises(nesy.UnsupportedMonadError, match="density"):
            bad_weather().truth(monad)


def test_sampler_with_networks_conditionals_and_torch_distributions() -> None:
    torch.manual_seed(3)
    digit = nesy.Categorical(torch.nn.Linear(2, 3), ["a", "b", "c"])
    after = nesy.Conditional(torch.randn(3, 2).log_softmax(-1), [0, 1], ["a", "b", "c"])
    x = torch.randn(2, 2)

    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        letter = yield digit(x)
        follows = yield after(letter)
        if letter == "a":
            return follows == 1
        return (follows == 0) | (letter == "c")

    estimate = run().truth(nesy.GirySampler, num_samples=50_000, seed=0)
    exact = run().truth(nesy.Dist)
    assert bool(((estimate.mean - exact).abs() < 4 * estimate.stderr).all())
    wait = nesy.continuous(torch.distributions.Exponential(torch.tensor(1.0)))
    late = nesy.fmap(lambda t: t > 1, wait).truth(nesy.GirySampler, num_samples=50_000, seed=0)
    assert abs(late.mean - math.exp(-1)) < 4 * late.stderr
    with pytest.raises(nesy.UnsupportedMonadError, match="Exponential"):
        nesy.fmap(lambda t: t > 1, wait).truth(nesy.GiryQuadrature)
    with pytest.raises(nesy.UnsupportedMonadError, match="nondeterministic"):
        nesy.fmap(lambda t: t > 1, nesy.nondet([1, 2])).truth(nesy.GirySampler)


def test_quadrature_is_exact_for_polynomials() -> None:
    """E[t^2] of a normal through the mass: weights t^2 enter as a bernoulli's probability."""

    @nesy.do
    def square() -> Generator[Any, Any, Any]:
        t = yield nesy.normal(0.3, 0.1)
        return (yield nesy.bernoulli(t * t))

    assert square().truth(nesy.GiryQuadrature, nodes=4).item() == pytest.approx(0.09 + 0.01)
