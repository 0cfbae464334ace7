"""What a family promises: points with a target, printed as they are measured and kept as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import history
import torch

from sapwood._measure import hold_memory, machine_name


@dataclass(frozen=True)
class Point:
    """One promise and what became of it. ``at_least`` False: the figure must not exceed it.

    Without a target, or where its condition is not met (``applies`` False), the figure is shown and
    not judged.
    """

    name: str
    target: float | None
    measured: float
    _: KW_ONLY
    at_least: bool = True
    unit: str = "x"
    note: str = ""
    applies: bool = True

    @property
    def passed(self) -> bool:
        if self.target is None:
            return True
        if self.at_least:
            return self.measured >= self.target
        return self.measured <= self.target

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if not self.applies:
            return "n/a"
        return "PASS" if self.passed else "MISS"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        wanted = "" if self.target is None else f"{sign:>3}{self.target:>7.4g}{self.unit:<3}"
        return (
            f"{self.name:<48}{wanted:<13}"
            f"{self.measured:>9.4g}{self.unit:<3} {self.verdict:<4}  {self.note}"
        ).rstrip()


def report(points: Iterable[Point], path: Path | None) -> int:
    """Prints each point when it is measured, writes all to a file, and counts the misses."""
    hold_memory()
    print(f"{machine_name()}, torch {torch.__version__}, commit {history.commit()}")
    print(f"{'point':<48}{'target':>10}{'measured':>12}")
    found = []
    for point in points:
        found.append(point)
        print(point, flush=True)
    missed = sum(point.verdict == "MISS" for point in found)
    print(f"{len(found)} points, {missed} missed")
    if path is not None:
        content = {
            "machine": machine_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": history.commit(),
            "points": [{**asdict(point), "verdict": point.verdict} for point in found],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
    return missed
