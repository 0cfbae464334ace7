"""Runs one case: every provider is checked, then all are timed in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sapwood._measure import Call, hold_memory, interleave


class Unavailable(Exception):
    """A provider that cannot run a case; the text says why."""


class WrongResult(Exception):
    """A provider whose result differs from the reference: it gets no time."""


class Case(Protocol):
    """One problem that several providers solve."""

    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def baseline(self) -> str:
        """The provider to which the others are compared."""
        ...

    @property
    def providers(self) -> tuple[str, ...]: ...

    def build(self, provider: str) -> Call:
        """The call to time, with all preparation done. Raises Unavailable."""
        ...

    def check(self, provider: str, result: object) -> None:
        """Compares a result with the reference in float64. Raises WrongResult."""
        ...


@dataclass(frozen=True)
class FamilyCase:
    """What the cases of a family share: the op decides who is compared with whom."""

    #: op -> (baseline, providers)
    table: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]]

    op: str

    @property
    def baseline(self) -> str:
        return self.table[self.op][0]

    @property
    def providers(self) -> tuple[str, ...]:
        return self.table[self.op][1]


def require_small_error(case: Case, provider: str, error: float, allowed: float) -> None:
    """Raises WrongResult for an error above what is allowed, or NaN."""
    if not error <= allowed:
        raise WrongResult(
            f"{case.op} {case.name}: {provider} is off by {error:.1e}, allowed are {allowed:.0e}"
        )


@dataclass(frozen=True)
class Timing:
    """What was measured of one provider; a ratio below 1 is faster than the baseline."""

    median_us: float
    fastest_us: float
    ratio: float  # median over the rounds of time / the baseline's time in the same round
    ratio_low: float  # first quartile
    ratio_high: float  # third quartile

    @property
    def speedup(self) -> float:
        return 1.0 / self.ratio


@dataclass(frozen=True)
class CaseResult:
    """Timings by provider, and the reasons of those that have none."""

    timings: dict[str, Timing]
    unavailable: dict[str, str]


def run_case(
    case: Case,
    providers: Iterable[str] | None = None,
    *,
    rounds: int = 15,
    seconds: float = 0.5,
    seed: int = 0,
) -> CaseResult:
    """Checks and times the providers of a case together.

    Args:
        case: the problem.
        providers: those to run, by default all; the baseline is always among them.
        rounds: smallest number of rounds.
        seconds: smallest duration of the rounds together.
        seed: of the order within the rounds.

    Raises:
        WrongResult: when a provider's result differs from the reference.
    """
    wanted = case.providers if providers is None else tuple(providers)
    calls: dict[str, Call] = {}
    unavailable: dict[str, str] = {}
    for provider in dict.fromkeys((case.baseline, *wanted)):
        try:
            call = case.build(provider)
        except Unavailable as reason:
            unavailable[provider] = str(reason)
            continue
        case.check(provider, call())
        calls[provider] = call
    hold_memory()
    times = interleave(calls, rounds=rounds, seconds=seconds, device=case.device, seed=seed)
    base = times[case.baseline]
    return CaseResult(
        {name: _timing(samples, base) for name, samples in times.items()}, unavailable
    )


def _timing(samples: Sequence[float], base: Sequence[float]) -> Timing:
    ratios = [s / b for s, b in zip(samples, base, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Timing(
        median_us=statistics.median(samples) * 1e6,
        fastest_us=min(samples) * 1e6,
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )
