"""Interleaved timing and the runner of benchmark cases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sapwood import _measure
from sapwood._measure import Sampler, interleave
from sapwood.cli.benchmarks.runner import Unavailable, WrongResult, run_case


class Clock:
    """Stands still except for what ``busy`` adds, so that no other program can disturb a test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def busy(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(_measure, "time", fake)
    monkeypatch.setattr(_measure, "SETTLE", 0.0)
    return fake


def test_every_round_runs_every_call_once_and_orders_vary(clock: Clock) -> None:
    seen: list[str] = []

    def call(name: str) -> Callable[[], None]:
        wait = clock.busy(2e-4)
        return lambda: (seen.append(name), wait())[1]

    times = interleave({name: call(name) for name in "abc"}, rounds=8, seconds=0)
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys("abc", 8)
    rounds = [tuple(seen[-24:][i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_rounds_continue_until_the_time_is_spent(clock: Clock) -> None:
    times = interleave({"a": clock.busy(1e-3)}, rounds=2, seconds=0.1)
    assert len(times["a"]) == pytest.approx(0.1 / 1e-3, abs=1)


def test_times_are_those_of_the_calls(clock: Clock) -> None:
    times = interleave({"short": clock.busy(1e-3), "long": clock.busy(4e-3)}, rounds=9, seconds=0)
    assert times["short"] == pytest.approx([1e-3] * 9)
    assert times["long"] == pytest.approx([4e-3] * 9)


def test_short_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    calls = []
    wait = clock.busy(1e-6)
    sampler = Sampler(lambda: (calls.append(None), wait()))
    before = len(calls)
    assert sampler.sample() == pytest.approx(1e-6)
    assert (len(calls) - before) * 1e-6 >= _measure.SHORTEST_SAMPLE


def test_a_call_settles_before_it_is_timed(clock: Clock) -> None:
    passes: list[None] = []

    def call() -> None:
        clock.now += 1e-3 if passes else 8e-3  # the first pass finds the cache cold
        passes.append(None)

    sampler = Sampler(call, settle=12e-3)
    passes.clear()
    assert sampler.sample() == pytest.approx(1e-3)
    assert len(passes) == 6


FAULTS = """
import resource, sys, torch
from sapwood._measure import hold_memory

held = sys.argv[1] == "hold" and hold_memory()
for _ in range(16):
    torch.ones(1 << 24)  # 64 MB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(1 << 24)
print(held, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    command = (sys.executable, "-c", FAULTS, how)
    held, count = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return held, int(count)


def test_held_memory_costs_no_page_faults() -> None:
    held, count = faults("hold")
    if held == "True":  # glibc
        assert count < 100 < faults("let go")[1]


def test_machine_name_states_threads_and_no_host() -> None:
    import platform

    name = _measure.machine_name()
    assert name.endswith(("thread", "threads"))
    assert platform.node() not in name


@dataclass(frozen=True)
class Fake:
    """A case whose providers wait; "wrong" gives another result, "absent" cannot run."""

    clock: Clock
    op: str = "fake"
    name: str = "fake"
    dtype: str = "float32"
    device: str = "cpu"
    baseline: str = "base"
    providers: tuple[str, ...] = ("base", "half", "absent")

    def build(self, provider: str) -> Callable[[], str]:
        if provider == "absent":
            raise Unavailable("not installed")
        wait = self.clock.busy(5e-4 if provider == "half" else 1e-3)
        return lambda: (wait(), provider)[1]

    def check(self, provider: str, result: object) -> None:
        if provider == "wrong":
            raise WrongResult(f"{provider} is off")


def test_ratios_are_to_the_baseline_of_the_case(clock: Clock) -> None:
    result = run_case(Fake(clock), rounds=9, seconds=0)
    assert result.timings["base"].ratio == 1.0
    half = result.timings["half"]
    assert half.median_us == pytest.approx(500)
    assert (half.ratio_low, half.ratio, half.ratio_high) == pytest.approx((0.5, 0.5, 0.5))
    assert half.speedup == pytest.approx(2)
    assert result.unavailable == {"absent": "not installed"}


def test_the_baseline_runs_even_when_it_is_not_asked_for(clock: Clock) -> None:
    assert set(run_case(Fake(clock), ("half",), rounds=1, seconds=0).timings) == {"base", "half"}


def test_a_wrong_result_gets_no_time(clock: Clock) -> None:
    with pytest.raises(WrongResult, match="wrong is off"):
        run_case(Fake(clock), ("wrong",), rounds=1, seconds=0)
