"""Schedules: the curves, the update steps, validation, state."""

from __future__ import annotations

import math

import pytest

from sapwood.pruning import Constant, Cubic, Iterative, Linear, OneShot, Schedule
from sapwood.pruning.schedules import schedule_from_state


@pytest.mark.parametrize("step", [0, 5, 10, 37, 90, 110, 200])
def test_curves(step: int) -> None:
    x = min(max((step - 10) / 100, 0.0), 1.0)
    arguments = {"t0": 10, "t1": 110, "every": 7, "s0": 0.2}
    assert Linear(0.9, **arguments).sparsity(step) == pytest.approx(0.2 + 0.7 * x)
    assert Cubic(0.9, **arguments).sparsity(step) == pytest.approx(0.9 - 0.7 * (1 - x) ** 3)


@pytest.mark.parametrize("cls", [Linear, Cubic])
@pytest.mark.parametrize("S", [0.1 + 0.2, 0.9, 0.7000000000000001, 1 / 3])
def test_the_end_is_exact(cls: type[Linear], S: float) -> None:
    schedule = cls(S, t1=99, every=10, s0=0.07)
    assert schedule.sparsity(99) == schedule.sparsity(1000) == S


def test_update_steps_include_t1() -> None:
    schedule = Linear(0.9, t0=10, t1=55, every=20)
    assert [step for step in range(100) if schedule.is_update(step)] == [10, 30, 50, 55]
    assert schedule.last_update == 55


def test_fractions_become_steps() -> None:
    schedule = Cubic(0.9, t0=0.1, t1=0.75, every=10)
    with pytest.raises(ValueError, match="total_steps must be given when t0 or t1 is a fraction"):
        schedule.sparsity(3)
    schedule.bind(200)
    assert (schedule.t0, schedule.t1) == (20, 150)
    whole = Linear(0.9, t1=1.0, every=1)
    whole.bind(40)
    assert whole.last_update == 40
    with pytest.raises(ValueError, match="t0 must be less than t1, got t0 = 30 and t1 = 20"):
        Linear(0.5, t0=30, t1=0.5, every=1).bind(40)


def test_one_shot_and_constant() -> None:
    cut = OneShot(0.8, at=5)
    assert [cut.sparsity(step) for step in (0, 4, 5, 9)] == [0.0, 0.0, 0.8, 0.8]
    assert [step for step in range(10) if cut.is_update(step)] == [5]
    assert Constant(0.5).sparsity(0) == 0.5
    assert [step for step in range(5) if Constant(0.5).is_update(step)] == [0]


def test_iterative_rounds() -> None:
    by_rounds = Iterative(rounds=4, rate=0.25)
    assert by_rounds.sparsity(4) == pytest.approx(1 - 0.75**4)
    by_target = Iterative(S=0.9, rate=0.2)
    assert by_target.rounds == 11
    assert by_target.sparsity(10) == pytest.approx(1 - 0.8**10)
    assert by_target.sparsity(11) == 0.9
    both = Iterative(S=0.9, rounds=5)
    assert both.sparsity(5) == 0.9
    assert 1 - both.sparsity(3) == pytest.approx(0.1 ** (3 / 5))
    assert Iterative(S=1 - 0.8**7).rounds == 7
    assert [step for step in range(9) if both.is_update(step)] == [1, 2, 3, 4, 5]


ALL = [
    OneShot(0.9, at=3),
    Constant(0.5),
    Linear(0.9, t1=30, every=4, s0=0.1),
    Cubic(0.9, t0=0.25, t1=0.75, every=4),
    Iterative(S=0.9, rounds=3),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.kind)
def test_state_round_trip(schedule: Schedule) -> None:
    restored = schedule_from_state(schedule.state_dict())
    assert type(restored) is type(schedule)
    for one in (schedule, restored):
        one.bind(40)
    steps = range(60)
    assert [restored.sparsity(s) for s in steps] == [schedule.sparsity(s) for s in steps]
    assert [restored.is_update(s) for s in steps] == [schedule.is_update(s) for s in steps]
    assert repr(restored) == repr(schedule)


def test_state_of_another_kind() -> None:
    with pytest.raises(ValueError, match="state must be of kind 'linear', got 'cubic'"):
        Linear(0.5, t1=3, every=1).load_state_dict(Cubic(0.5, t1=3, every=1).state_dict())
    with pytest.raises(ValueError, match="kind must be one of"):
        schedule_from_state({"kind": "quadratic"})
    with pytest.raises(ValueError, match="Linear: state must fit the constructor"):
        schedule_from_state({"kind": "linear", "S": 0.5})
    schedule = Linear(0.5, t1=3, every=1)
    schedule.load_state_dict(Linear(0.9, t1=6, every=2).state_dict())
    assert schedule.sparsity(6) == 0.9


@pytest.mark.parametrize("S", [math.nan, math.inf, -math.inf, -0.1, 1.0])
def test_sparsity_must_be_finite_and_below_one(S: float) -> None:
    for make in (
        lambda: OneShot(S),
        lambda: Constant(S),
        lambda: Linear(S, t1=3, every=1),
        lambda: Cubic(0.9, t1=3, every=1, s0=S),
        lambda: Iterative(S=S),
    ):
        with pytest.raises(ValueError, match=r"(S|s0) must be finite and in \[0, 1\), got"):
            make()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"t1": 5, "t0": 5}, ValueError, "t0 must be less than t1, got t0 = 5 and t1 = 5"),
        ({"t1": 5, "t0": -1}, ValueError, "t0 must be at least 0, got -1"),
        ({"t1": 1.5}, ValueError, r"t1 must be a step or a fraction in \(0, 1\], got 1\.5"),
        ({"t1": math.nan}, ValueError, "t1 must be a step or a fraction"),
        ({"t1": 5, "every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"t1": 5, "every": 2.0}, TypeError, "every must be an integer, got 2.0"),
        ({"t1": 5, "s0": 0.8}, ValueError, "s0 must be at most S = 0.5, got 0.8"),
        ({"t1": 0.2, "t0": 0.4}, ValueError, "t0 must be less than t1"),
    ],
)
def test_ramps_validate(arguments: dict, error: type[Exception], text: str) -> None:  # type: ignore[type-arg]
    for cls in (Linear, Cubic):
        with pytest.raises(error, match=text):
            cls(0.5, **{"every": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "S or rounds must be given, got neither"),
        ({"S": 0.5, "rate": 0.0}, r"rate must be in \(0, 1\), got 0\.0"),
        ({"S": 0.5, "rate": math.nan}, r"rate must be in \(0, 1\)"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_iterative_validates(arguments: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=text):
        Iterative(**arguments)
