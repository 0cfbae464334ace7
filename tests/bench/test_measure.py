"""Interleaved timing and the runner of benchmark cases."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sapwood import _measure
from sapwood._measure import Sampler, interleave
from sapwood.cli.benchmarks.runner import Unavailable, WrongResult, run_case


def busy(seconds: float) -> Callable[[], None]:
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def test_every_round_runs_every_call_once_and_orders_vary() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: (seen.append(name), busy(2e-4)())) for name in "abc"}
    times = interleave(calls, rounds=8, seconds=0)
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys("abc", 8)
    timed = seen[-48::2]  # every sample is a warm-up and a timed call
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_rounds_continue_until_the_time_is_spent() -> None:
    start = time.perf_counter()
    times = interleave({"a": busy(1e-3)}, rounds=2, seconds=0.1)
    assert time.perf_counter() - start >= 0.1
    assert len(times["a"]) > 2


def test_times_are_those_of_the_calls() -> None:
    times = interleave({"short": busy(1e-3), "long": busy(4e-3)}, rounds=9, seconds=0)
    assert min(times["short"]) == pytest.approx(1e-3, rel=0.2)
    assert min(times["long"]) / min(times["short"]) == pytest.approx(4, rel=0.2)


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = itertools.count()
    sampler = Sampler(lambda: next(count))
    before = next(count)
    per_call = sampler.sample()
    repeats = next(count) - before - 1
    assert repeats > 100
    assert per_call < _measure.SHORTEST_SAMPLE


def test_machine_name_states_threads_and_no_host() -> None:
    import platform

    name = _measure.machine_name()
    assert name.endswith(("thread", "threads"))
    assert platform.node() not in name


@dataclass(frozen=True)
class Fake:
    """A case whose providers wait; "wrong" gives another result, "absent" cannot run."""

    op: str = "fake"
    name: str = "fake"
    dtype: str = "float32"
    device: str = "cpu"
    baseline: str = "base"
    providers: tuple[str, ...] = ("base", "half", "absent")

    def build(self, provider: str) -> Callable[[], str]:
        if provider == "absent":
            raise Unavailable("not installed")
        wait = busy(5e-4 if provider == "half" else 1e-3)
        return lambda: (wait(), provider)[1]

    def check(self, provider: str, result: object) -> None:
        if provider == "wrong":
            raise WrongResult(f"{provider} is off")


def test_ratios_are_to_the_baseline_of_the_case() -> None:
    result = run_case(Fake(), rounds=9, seconds=0)
    assert result.timings["base"].ratio == 1.0
    half = result.timings["half"]
    assert half.ratio == pytest.approx(0.5, rel=0.2)
    assert half.ratio_low <= half.ratio <= half.ratio_high
    assert half.speedup == pytest.approx(1 / half.ratio)
    assert half.fastest_us <= half.median_us
    assert result.unavailable == {"absent": "not installed"}


def test_the_baseline_runs_even_when_it_is_not_asked_for() -> None:
    assert set(run_case(Fake(), ("half",), rounds=1, seconds=0).timings) == {"base", "half"}


def test_a_wrong_result_gets_no_time() -> None:
    with pytest.raises(WrongResult, match="wrong is off"):
        run_case(Fake(), ("wrong",), rounds=1, seconds=0)
