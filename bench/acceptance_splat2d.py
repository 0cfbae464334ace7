"""The promises of the splat2d family: target, measured, PASS or MISS.

    python bench/acceptance_splat2d.py [--threads 1] [--only speed batch ...] [--json FILE]

Speed is counted per evaluated pair (a pixel and a Gaussian with q <= cutoff), in units of the time
that ``torch.exp`` takes per element of a preallocated vector of 2^24. All times are minima over
interleaved runs within one process. Memory is the growth of the peak resident set in a child
process that runs one call, over inputs and results.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from points import Point, report
from torch import Tensor

from sapwood.ops import splat2d_pairs
from sapwood.ops.splat2d import DEFAULT_CUTOFF

#: name -> batch, height, width, Gaussians
SCENES: dict[str, tuple[int, int, int, int]] = {
    "S1": (1, 256, 256, 2500),
    "S2": (1, 256, 256, 10_000),
    "S3": (1, 512, 768, 20_000),
    "S4": (16, 128, 128, 600),
}
#: name -> forward, forward + backward in units of exp
TARGETS = {"S1": (2.0, 5.0), "S2": (3.5, 9.0), "S3": (2.0, 5.0), "S4": (2.0, 5.0)}
AIMS = {"S1": (1.2, 3.0), "S2": (2.0, 5.0), "S3": (1.2, 3.0), "S4": (1.2, 3.0)}


CHUNK = 16  # Gaussians that dense torch draws at a time: 1 MB of weights


@dataclass(frozen=True)
class Problem:
    """Gaussians and a gradient of their image."""

    mu: Tensor
    chol: Tensor
    feat: Tensor
    grad: Tensor

    def forward(self) -> Tensor:
        size = self.grad.shape[2:]
        image: Tensor = torch.ops.sapwood.splat2d(
            self.mu, self.chol, self.feat, None, *size, DEFAULT_CUTOFF
        )
        return image

    def backward(self) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.sapwood.splat2d_backward(
            self.grad, self.mu, self.chol, self.feat, None, DEFAULT_CUTOFF, False
        )
        return grads

    def both(self) -> object:
        return self.forward(), self.backward()

    def items(self) -> list[Problem]:
        parts = (self.mu, self.chol, self.feat, self.grad)
        return [Problem(*(t[b : b + 1] for t in parts)) for b in range(len(self.mu))]

    @property
    def pairs(self) -> int:
        return int(splat2d_pairs(self.mu, self.chol, tuple(self.grad.shape[2:])).sum())


def problem(batch: int, height: int, width: int, n: int) -> Problem:
    """Positions uniform, sizes so that about a dozen Gaussians cover a pixel; seed 0."""
    g = torch.Generator().manual_seed(0)
    mu = torch.rand(batch, n, 2, generator=g) * torch.tensor([width, height]) - 0.5
    z = torch.randn(batch, n, 3, generator=g)
    sigma = 0.6 * math.sqrt(height * width / n)
    l1, l3 = sigma * (0.3 * z[..., 0]).exp(), sigma * (0.3 * z[..., 1]).exp()
    chol = torch.stack([l1, 0.3 * l1 * z[..., 2], l3], -1)
    feat = torch.randn(batch, n, 3, generator=g)
    return Problem(mu, chol, feat, torch.randn(batch, 3, height, width, generator=g))


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some interleaved runs, each after every other."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def speed(rounds: int) -> Iterator[Point]:
    """Nanoseconds per pair against those of an exponential."""
    x = torch.empty(2**24).uniform_(-5.55, 0.0, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)  # zeros, not empty: every page is touched
    problems = {name: problem(*sizes) for name, sizes in SCENES.items()}
    calls: dict[str, Callable[[], object]] = {"exp": lambda: torch.exp(x, out=y)}
    for name, p in problems.items():
        calls[f"{name} forward"] = p.forward
        calls[f"{name} forward + backward"] = p.both
    times = fastest(calls, max(20, rounds))
    unit = times["exp"] / x.numel()
    for name, p in problems.items():
        for i, what in enumerate(("forward", "forward + backward")):
            each = times[f"{name} {what}"] / p.pairs
            note = f"{each * 1e9:.2f} ns per pair, exp {unit * 1e9:.2f} ns"
            number = 10 + i
            yield Point(
                f"{number} {name} {what}",
                TARGETS[name][i],
                each / unit,
                unit=" E",
                note=note,
                at_least=False,
            )
            yield Point(
                f"{number} {name} {what}, aim",
                AIMS[name][i],
                each / unit,
                unit=" E",
                at_least=False,
            )


def one_by_one(problems: Sequence[Problem]) -> None:
    """A call for every problem."""
    for p in problems:
        p.both()


def batch(rounds: int) -> Iterator[Point]:
    """One call for a batch against a call per item."""
    for name, sizes, target in (
        ("S4", SCENES["S4"], 0.9),
        ("64 items of 32x32, N = 60", (64, 32, 32, 60), 0.5),
    ):
        whole = problem(*sizes)
        parts = whole.items()
        times = fastest({"batch": whole.both, "items": partial(one_by_one, parts)}, 10 * rounds)
        note = f"{times['batch'] * 1e3:.2f} ms against {times['items'] * 1e3:.2f} ms"
        yield Point(
            f"12 {name}, time / single calls",
            target,
            times["batch"] / times["items"],
            note=note,
            at_least=False,
        )


def dense(mu: Tensor, chol: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
    """Every Gaussian at every pixel and one product, in chunks that stay in cache."""
    image = feat.new_zeros(feat.shape[1], height * width)
    for first in range(0, len(mu), CHUNK):
        at = slice(first, first + CHUNK)
        x = torch.arange(width, dtype=mu.dtype) - mu[at, :1]  # (n, W)
        y = torch.arange(height, dtype=mu.dtype) - mu[at, 1:]  # (n, H)
        l1, l2, l3 = chol[at, :, None].unbind(1)
        u = x / l1
        v = (y / l3)[:, :, None] - (l2 / l3 * u)[:, None, :]  # (n, H, W)
        q = u.square()[:, None, :] + v.square()
        seen = q.clamp(max=DEFAULT_CUTOFF)  # exp is many times slower where it underflows
        w = torch.where(q <= DEFAULT_CUTOFF, (-0.5 * seen).exp(), 0.0)
        image = torch.addmm(image, feat[at].T, w.flatten(1))
    return image.view(-1, height, width)


def oracle(rounds: int) -> Iterator[Point]:
    """Against dense torch, forward and backward."""
    p = problem(1, 128, 128, 500)
    mu, chol, feat = leaves = [t[0].clone().requires_grad_() for t in (p.mu, p.chol, p.feat)]

    def by_torch() -> object:
        return torch.autograd.grad(dense(mu, chol, feat, 128, 128), leaves, p.grad[0])

    error = (dense(mu, chol, feat, 128, 128) - p.forward()[0]).abs().max()
    times = fastest({"sapwood": p.both, "dense": by_torch}, 5 * rounds)
    ratio = times["dense"] / times["sapwood"]
    note = (
        f"{times['dense'] * 1e3:.1f} ms against {times['sapwood'] * 1e3:.2f} ms, apart {error:.0e}"
    )
    yield Point("13 dense torch / splat2d, 128x128", 30.0, ratio, note=note, at_least=True)


def threads(rounds: int) -> Iterator[Point]:
    """Two threads on two idle cores."""
    before = torch.get_num_threads()
    p = problem(*SCENES["S3"])
    best = {1: float("inf"), 2: float("inf")}
    for _ in range(4 * rounds):
        for count in best:
            torch.set_num_threads(count)
            best[count] = min(best[count], fastest({"both": p.both}, 2)["both"])
    torch.set_num_threads(before)
    note = f"{best[1] * 1e3:.1f} ms and {best[2] * 1e3:.1f} ms"
    yield Point(
        "13 S3, one thread / two threads",
        1.6,
        best[1] / best[2],
        note=note,
        at_least=True,
    )


def memory(rounds: int) -> Iterator[Point]:
    """What a call needs beside inputs and results, and that it grows linearly."""
    for what in ("forward", "backward"):
        found = {}
        for side, n in ((1024, 40_000), (2048, 40_000), (1024, 160_000)):
            sizes = (1, side, side, n)
            found[sizes] = peak_in_child(what, sizes)
            entries = list_entries(problem(*sizes))
            allowed = (64 * n + 8 * entries + 4 * 5 * side * side) / 1e6
            name = f"14 {what}, {side}x{side}, N = {n}"
            yield Point(
                name,
                allowed,
                found[sizes],
                unit=" MB",
                note=f"{entries} list entries",
                at_least=False,
            )
        first, more_pixels, more_gaussians = found.values()
        growth = max(more_pixels, more_gaussians) / first
        yield Point(f"14 {what}, growth for 4 times the pixels or N", 4.4, growth, at_least=False)


def list_entries(p: Problem) -> int:
    """(Gaussian, band of 16 rows) pairs."""
    rise = DEFAULT_CUTOFF**0.5 * p.chol[..., 1:].norm(dim=-1)
    height = p.grad.shape[2]
    top = (p.mu[..., 1] - rise).clamp(0, height - 1) // 16
    bottom = (p.mu[..., 1] + rise).clamp(0, height - 1) // 16
    return int((bottom - top + 1).sum())


def peak_in_child(what: str, sizes: Sequence[int]) -> float:
    """MB of a call beside its inputs and results, in a process of its own."""
    child = (what, *map(str, sizes), str(torch.get_num_threads()))
    command = (sys.executable, __file__, "--child", *child)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_child(what: str, sizes: tuple[int, int, int, int]) -> float:
    small = problem(1, 64, 64, 100)
    getattr(small, what)()  # threads and libraries exist
    p = problem(*sizes)
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = kib("VmRSS")
    results = getattr(p, what)()
    total = (kib("VmHWM") - before) * 1024
    parts = results if isinstance(results, tuple) else (results,)
    return float(total - sum(t.nbytes for t in parts)) / 1e6


GROUPS: dict[str, Callable[[int], Iterator[Point]]] = {
    "speed": speed,
    "batch": batch,
    "oracle": oracle,
    "memory": memory,
    "threads": threads,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        what, b, h, w, n, threads = options.child
        torch.set_num_threads(int(threads))
        print(measure_child(what, (int(b), int(h), int(w), int(n))))
        return 0
    torch.set_num_threads(options.threads)
    points = chain.from_iterable(GROUPS[name](options.rounds) for name in options.only)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
