"""The compiled truth against enumeration of all branches, in float64."""

from __future__ import annotations

import math
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from sapwood import nesy
from tests.nesy.random_programs import ROWS, Script

PROGRAMS, CHUNKS = 2000, 8
PA, PB, PC = ({0: p, 1: 1 - p} for p in (Fraction(3, 10), Fraction(4, 10), Fraction(1, 4)))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk: int) -> None:
    """Masses agree to 1e-12, and what cannot be true is exactly -inf."""
    impossible = possible = 0
    for seed in range(chunk * PROGRAMS // CHUNKS, (chunk + 1) * PROGRAMS // CHUNKS):
        program = Script(seed, batched=seed % 4 != 0).program().double()
        expected = program.truth(nesy.Tens)
        found = program.log_truth("none").detach()
        zero = expected.expand(found.shape) == 0
        assert bool((found[zero] == -torch.inf).all()), seed
        error = (found.exp() / expected - 1)[~zero].abs()
        assert bool((error <= 1e-12).all()), (seed, expected, found.exp())
        impossible += int(zero.sum())
        possible += int((~zero).sum())
    assert possible > impossible > 0


@pytest.mark.parametrize("seed", range(0, 400, 4))
def test_given_guards_and_strict(seed: int) -> None:
    """Conditioning agrees with Dist, and the strict joint with elimination."""
    script = Script(seed + 1)
    program = script.program().double()
    joint = program.log_truth("none", strict=True).exp()
    torch.testing.assert_close(joint, program.log_truth("none").exp(), rtol=1e-12, atol=0)
    try:
        expected = program.truth(nesy.Dist)
    except nesy.UnsupportedMonadError:  # a row without any mass
        return
    found = program.log_truth("evidence").detach().exp().expand(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)


def test_rows_are_independent() -> None:
    """A batch equals its rows one by one."""
    for seed in range(1, 120):
        script = Script(seed)
        together = script.program().double().log_truth("none")
        if together.dim() == 0:
            continue
        rows = [slice(r, r + 1) for r in range(ROWS)]
        single = [script.on(script.x[r], script.n[r]).double().log_truth("none") for r in rows]
        apart = torch.cat([s.reshape(1) for s in single])
        torch.testing.assert_close(together, apart, rtol=1e-14, atol=1e-14)


@nesy.do
def nine_for_both() -> Generator[Any, Any, Any]:
    a, b = (yield nesy.choice(PA)), (yield nesy.choice(PB))
    if a == 1 and b == 1:
        return nesy.fmap(lambda s: s, nesy.uniform([9]))
    return a + b


def values(program: nesy.Program) -> dict[Any, float]:
    found = program.double().distribution()
    return dict(zip(found.support, found.log_prob.exp().tolist(), strict=True))


def test_additive_only_where_probed() -> None:
    """A sum with an exception at one corner."""

    @nesy.do
    def total(n: int) -> Generator[Any, Any, Any]:
        a, b = (yield nesy.choice(PA)), (yield nesy.choice(PB))
        s = 9 if a == 1 and b == 1 else a + b
        return s == n

    assert total(2).log_truth() == -math.inf
    assert total(9).double().log_truth().exp().item() == pytest.approx(0.42, abs=1e-12)
    assert total(9).truth(nesy.Dist(number=Fraction)) == Fraction(42, 100)


def test_two_closures_of_one_function() -> None:
    def make(factor: int) -> nesy.Program:
        @nesy.do
        def total() -> Generator[Any, Any, Any]:
            a, b = (yield nesy.choice(PA)), (yield nesy.choice(PB))
            return factor * a + b == 1

        return total()

    found = [make(k).double().log_truth().exp().item() for k in (1, 2)]
    assert found == pytest.approx([0.46, 0.18], abs=1e-12)


def test_difference() -> None:
    @nesy.do
    def total() -> Generator[Any, Any, Any]:
        a, b = (yield nesy.choice(PA)), (yield nesy.choice(PB))
        return a + b - (yield nesy.choice(PC))

    expected = {-1: 0.09, 0: 0.375, 1: 0.43, 2: 0.105}
    assert values(total()) == pytest.approx(expected, abs=1e-12)


def test_dependent_bind() -> None:
    @nesy.do
    def branch() -> Generator[Any, Any, Any]:
        a = yield nesy.choice(PA)
        b = yield (nesy.choice(PB) if a == 0 else nesy.uniform([0, 1]))
        return b == 1

    assert branch().double().log_truth().exp().item() == pytest.approx(0.53, abs=1e-12)
    assert branch().truth(nesy.Dist(number=Fraction)) == Fraction(53, 100)


def test_a_program_that_returns_a_program_is_no_value() -> None:
    with pytest.raises(TypeError):
        nine_for_both().log_truth()


def test_dice() -> None:
    @nesy.do
    def six_then_even() -> Generator[Any, Any, Any]:
        first = yield nesy.uniform(range(1, 7))
        second = yield nesy.uniform(range(1, 7))
        return (first == 6) & (second % 2 == 0)

    assert six_then_even().truth(nesy.Dist(number=Fraction)) == Fraction(1, 12)
    assert six_then_even().double().log_truth().exp().item() == pytest.approx(1 / 12, abs=1e-12)


def chained(second: Any) -> nesy.Program:
    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        a = yield nesy.uniform([0, 1])
        return (yield second(a)) == 1

    return run()


def test_unnormalised_masses_tilt() -> None:
    """Normalised heads give 0.745; masses (1, 1) and (1, 99) give 100/102."""
    masses = torch.tensor([[1.0, 1.0], [1.0, 99.0]], dtype=torch.float64)
    heads = nesy.Conditional((masses / masses.sum(-1, keepdim=True)).log(), [0, 1], [0, 1])
    assert chained(heads).log_truth().exp().item() == pytest.approx(0.745, abs=1e-12)
    tilted = nesy.Weighted(masses.log(), [0, 1], [0, 1], allow_tilt=True)
    assert chained(tilted).log_truth().exp().item() == pytest.approx(100 / 102, abs=1e-12)
    assert chained(tilted).log_truth(strict=True).exp().item() == pytest.approx(
        100 / 102, abs=1e-12
    )
    with pytest.raises(nesy.TiltError, match="allow_tilt"):
        chained(nesy.Weighted(masses.log(), [0, 1], [0, 1])).log_truth()
    single = nesy.Weighted(masses[1].log(), [0, 1])
    with pytest.raises(nesy.TiltError):  # also where it is a branch that depends on the value
        chained(lambda a: single() if a == 0 else nesy.uniform([0, 1])).log_truth()
    free = nesy.fmap(lambda v: v == 1, single())
    assert free.log_truth().exp().item() == pytest.approx(0.99, abs=1e-12)
    assert free.log_truth("none").exp().item() == pytest.approx(99, abs=1e-10)


def test_two_sided_symbols_see_a_distribution() -> None:
    net = nn.Linear(3, 2).double()
    blur = nesy.TwoSided(net, ["no", "yes"])
    log_p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    source = nesy.Conditional(log_p[None], [0, 1, 2], [0])
    program = nesy.fmap(lambda v: v == "yes", blur(nesy.fmap(lambda v: v, source(0))))
    expected = net(log_p).softmax(-1)[1].item()
    assert program.log_truth().exp().item() == pytest.approx(expected, rel=1e-12)
    assert program.truth(nesy.Dist).item() == pytest.approx(expected, rel=1e-6)


def test_observed_data_in_every_position() -> None:
    """Comparisons other than equality, data on both sides, and the same data twice."""
    n, m = torch.tensor([0, 2, 5, 3]), torch.tensor([1, 2, 0, 3])
    die = nesy.uniform(range(6))

    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        x, y = nesy.observed(n), nesy.observed(m)
        a, b = (yield die), (yield die)
        yield nesy.guard((a < x) | (b >= y))
        yield nesy.guard(a != x * y)
        return (a + b == x + y) & (a - b != x)

    program = run().double()
    torch.testing.assert_close(
        program.log_truth("none").exp(), program.truth(nesy.Tens), rtol=1e-12, atol=0
    )


def test_gradients_are_those_of_the_enumerated_sum() -> None:
    """Against autograd through the sum over all branches, written out."""
    logits = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    digit = nesy.Categorical(nn.Identity(), range(5), name="digit")
    n = torch.tensor([0, 3, 8, 4])

    @nesy.do
    def add(x: torch.Tensor, y: torch.Tensor, total: Any) -> Generator[Any, Any, Any]:
        d = yield digit(x)
        e = (yield digit(y)) if d < 3 else (yield nesy.uniform(range(5)))
        return d * e == total

    found = add(logits[:, 0], logits[:, 1], nesy.observed(n)).log_truth()
    possible = found > -torch.inf
    (grad,) = torch.autograd.grad(found[possible].sum(), logits)
    p, q = logits.softmax(-1).unbind(1)
    expected = torch.zeros(4, dtype=torch.float64)
    for d in range(5):
        for e in range(5):
            weight = q[:, e] if d < 3 else torch.full_like(q[:, e], 0.2)
            expected = expected + torch.where(n == d * e, p[:, d] * weight, 0.0)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=0)
    (want,) = torch.autograd.grad(expected[possible].log().sum(), logits)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)
