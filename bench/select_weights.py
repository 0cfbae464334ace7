"""Measures ``sapwood.pruning.select`` against ``torch.kthvalue`` and ``torch.sort``.

``python bench/select_weights.py [--elements 1e7] [--threads 1] [--json FILE]``: one selection among
float32 scores in 8 tensors, masks included, against the threshold alone by ``kthvalue`` and against
a sort, both on the concatenated scores. The result is compared with a stable sort before anything
is timed; then the fastest of several interleaved rounds counts. Memory is the growth of the
resident set of a child process that runs one provider once, the masks that ``select`` returns
included. The exit status is 1 when a floor is missed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from peak_memory import _kib
from points import Point, report
from torch import Tensor

from sapwood.pruning import MaskSet, select

PARTS = 8
KINDS = ("continuous", "ties", "half off", "absolute")
#: What we aim at: time over that of kthvalue and of sort.
FLOORS = {"kthvalue": 0.7, "sort": 0.15}
#: Extra MiB of a call; from LARGE elements on, the whole peak over the size of the scores instead.
EXTRA_MIB, PEAK_RATIO, LARGE = 64.0, 1.3, 5 * 10**7
_MIB = 1 << 20


@dataclass(frozen=True)
class Problem:
    """Scores to select from; ``kind`` says what is special about them.

    "continuous" has hardly a tie, "ties" 33 values; of "half off" half is off already and the
    other half is ranked; "absolute" are weights of both signs, ranked without a copy.
    """

    kind: str
    scores: Tensor  # (elements,)
    masks: MaskSet
    sparsity: float

    @classmethod
    def of(cls, kind: str, elements: int, sparsity: float) -> Problem:
        scores = torch.empty(elements).normal_(generator=torch.Generator().manual_seed(0))
        if kind == "ties":
            scores.mul_(8).round_().clamp_(-32, 32)
        if kind != "absolute":
            scores.abs_()
        keep = torch.ones(elements, dtype=torch.bool)
        if kind == "half off":
            keep[::2] = False
        return cls(kind, scores, MaskSet(parts(keep)), sparsity)

    def providers(self) -> dict[str, Callable[[], object]]:
        """The calls to compare, by name."""
        split, k = parts(self.scores), self.off
        magnitude = self.kind == "absolute"

        def ranked() -> Tensor:
            return self.scores.abs() if magnitude else self.scores

        return {
            "select": lambda: select(split, self.masks, self.sparsity, absolute=magnitude),
            "kthvalue": lambda: torch.kthvalue(ranked(), k),
            "sort": lambda: torch.sort(ranked()),
        }

    @property
    def off(self) -> int:
        return round(self.sparsity * self.scores.numel())

    def check(self) -> None:
        """Compares the result with that of a stable sort, element by element."""
        ranked = self.scores.abs() if self.kind == "absolute" else self.scores.clone()
        ranked.masked_fill_(~torch.cat(list(self.masks.values())), -1.0)
        expected = torch.ones(self.scores.numel(), dtype=torch.bool)
        expected[torch.sort(ranked, stable=True).indices[: self.off]] = False
        chosen = self.providers()["select"]()
        assert isinstance(chosen, MaskSet)
        if not torch.equal(torch.cat(list(chosen.values())), expected):
            raise SystemExit(f"{self.kind}: the selection differs from a stable sort")


def parts(whole: Tensor) -> dict[str, Tensor]:
    return {f"layer{i}": part for i, part in enumerate(whole.chunk(PARTS))}


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of interleaved rounds, after one call of each that is not timed."""
    best = dict.fromkeys(calls, float("inf"))
    order, shuffle = list(calls), random.Random(0).shuffle
    for call in calls.values():
        call()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_mib(kind: str, elements: int, sparsity: float, provider: str, threads: int) -> float:
    """How many MiB the resident set grows by in one call, measured in a child process."""
    options = ["--elements", str(elements), "--sparsity", str(sparsity), "--threads", str(threads)]
    command = (sys.executable, __file__, *options, "--child", kind, provider)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_growth(problem: Problem, provider: str) -> float:
    """As ``peak_mib``, in this process; a small call before it loads the code."""
    Problem.of(problem.kind, 1000, problem.sparsity).providers()[provider]()
    status, call = Path("/proc/self/status"), problem.providers()[provider]
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = _kib(status, "VmRSS")
    call()
    return (_kib(status, "VmHWM") - before) / 1024


def measured(kind: str, options: argparse.Namespace) -> list[Point]:
    """All figures for one kind of scores."""
    elements, sparsity, threads = options.elements, options.sparsity, options.threads
    problem = Problem.of(kind, elements, sparsity)
    problem.check()
    seconds = fastest(problem.providers(), options.rounds)
    del problem
    points = [
        Point(
            f"{kind}: time / {peer}",
            floor,
            seconds["select"] / seconds[peer],
            at_least=False,
            note=f"{seconds['select'] * 1e3:.0f} ms, {seconds[peer] * 1e3:.0f} ms",
        )
        for peer, floor in FLOORS.items()
    ]
    memory = {p: peak_mib(kind, elements, sparsity, p, threads) for p in ("select", *FLOORS)}
    note = ", ".join(f"{p} +{memory[p]:.0f}" for p in FLOORS)
    extra = memory["select"]
    if elements >= LARGE:
        ratio = 1.0 + extra * _MIB / (4 * elements)
        name, note = f"{kind}: peak / scores", f"+{extra:.0f} MiB; {note}"
        return [*points, Point(name, PEAK_RATIO, ratio, at_least=False, note=note)]
    name = f"{kind}: extra memory"
    return [*points, Point(name, EXTRA_MIB, extra, at_least=False, unit="Mi", note=note)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**7)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        kind, provider = options.child
        problem = Problem.of(kind, options.elements, options.sparsity)
        print(measure_growth(problem, provider))
        return 0
    print(f"{options.elements} scores in {PARTS} tensors, sparsity {options.sparsity}")
    points = chain.from_iterable(measured(kind, options) for kind in options.kinds)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
