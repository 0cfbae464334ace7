"""Measures the promises of the logsemiring family: target, measured, PASS or MISS.

``python bench/acceptance_logsemiring.py`` runs every point; ``--json FILE`` writes the figures,
``--only NAME`` selects groups. Every figure is a ratio of the fastest of interleaved repeats within
this process unless the point says otherwise: of the calling thread's own time with ``--threads 1``,
which other programs of the machine do not stretch, else of the time on the wall. The exit status is
1 when a point is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from points import Point, report
from torch import Tensor

from sapwood import ops
from sapwood._measure import interleave
from sapwood.cli.benchmarks.logsemiring import LogsemiringCase

ROUNDS = 20


def fastest(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of the fastest repeat, by name."""
    if torch.get_num_threads() == 1:
        return {name: min(s) for name, s in own_time(calls, rounds).items()}
    times = interleave(calls, rounds=rounds, seconds=0.3)
    return {name: min(samples) for name, samples in times.items()}


def own_time(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of this thread per call, one sample of at least 2 ms per round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start, count, spent = time.thread_time(), 0, 0.0
            while spent < 2e-3:
                call()
                count += 1
                spent = time.thread_time() - start
            times[name].append(spent / count)
    return times


def compared(case: LogsemiringCase, *providers: str, rounds: int = ROUNDS) -> dict[str, float]:
    """The same for providers of a case, each checked first."""
    calls = {}
    for provider in providers:
        calls[provider] = case.build(provider)
        case.check(provider, calls[provider]())
    return fastest(calls, rounds)


def cube(side: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(side)
    return tuple(torch.randn(side, side, generator=g) * scale for _ in range(2))  # type: ignore[return-value]


def broadcast() -> Iterator[Point]:
    """256^3 forward and backward against the broadcast form."""
    case = LogsemiringCase("log_matmul_grad", 1, 256, 256, 256)
    times = compared(case, "broadcast", "sapwood", rounds=5)
    note = f"broadcast {times['broadcast'] * 1e3:.0f} ms, sapwood {times['sapwood'] * 1e3:.2f} ms"
    yield Point(
        "14 256^3 forward and backward", 100, times["broadcast"] / times["sapwood"], note=note
    )


def product() -> Iterator[Point]:
    """512^3 against torch.mm."""
    a, b = cube(512)
    x, y = (t.clone().requires_grad_() for t in (a, b))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.log_matmul(x, y).sum(), (x, y))

    times = fastest({"mm": lambda: a @ b, "forward": lambda: ops.log_matmul(a, b), "both": both})
    note = f"torch.mm {times['mm'] * 1e3:.2f} ms"
    yield Point(
        "15 512^3 forward / torch.mm",
        1.6,
        times["forward"] / times["mm"],
        at_least=False,
        note=note,
    )
    yield Point("15   the further aim", 1.3, times["forward"] / times["mm"], at_least=False)
    yield Point("15 512^3 both passes / torch.mm", 6.0, times["both"] / times["mm"], at_least=False)


def exact() -> Iterator[Point]:
    """Terms per second of the exact kernels on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (a, b), (c, d) = cube(256), cube(256, 1e4)
    times = fastest(
        {
            "mm": lambda: a @ b,
            "exact": lambda: ops.log_matmul(a, b, method="exact"),
            "large": lambda: ops.log_matmul(c, d, method="exact"),
            "max": lambda: ops.max_matmul(a, b),
        }
    )
    torch.set_num_threads(before)
    rate = {name: 256**3 / seconds / 1e9 for name, seconds in times.items()}
    note = f"torch.mm {2 * rate['mm']:.0f} GFLOP/s in the same rounds"
    yield Point("16 exact, 1e9 terms per second", 5, rate["exact"], unit="", note=note)
    yield Point("16 scale 1e4 / scale 1", 0.8, rate["large"] / rate["exact"])
    yield Point("16 max-plus with indices, 1e9 terms/s", 40, rate["max"], unit="")


def small() -> Iterator[Point]:
    """Small batches, and the overhead of a call."""
    times = compared(LogsemiringCase("log_matmul", 256, 10, 10, 19), "uncertified", "sapwood")
    ratio = times["sapwood"] / times["uncertified"]
    yield Point("17 256x(10x10x19) / uncertified trick", 0.6, ratio, at_least=False)
    a, b = torch.randn(1, 2, 2), torch.randn(1, 2, 2)
    empty = torch.randn(0, 2, 2)
    raw = torch.ops.sapwood.log_matmul.default
    calls = {"op": lambda: raw(empty, empty, False), "call": lambda: ops.log_matmul(a[0], b[0])}
    times = fastest(calls, 50)
    over = (times["call"] - times["op"]) * 1e6
    yield Point("17 2x2 above an op without work", 10, over, at_least=False, unit="us")


def scan() -> Iterator[Point]:
    """Log_scan against a loop of torch.logsumexp."""
    times = compared(LogsemiringCase("log_scan", 32, 64, 2, 2), "loop", "sapwood")
    yield Point("18 log_scan B=32 L=64 k=2, both passes", 20, times["loop"] / times["sapwood"])


def obvious() -> Iterator[Point]:
    """Never slower than the obvious form in torch: its time over ours."""
    for what, case in (
        ("segment_logsumexp", LogsemiringCase("segment_logsumexp", 1, 20_000, 1, 300)),
        (
            "   its second derivative",
            LogsemiringCase("segment_logsumexp_grad_grad", 1, 20_000, 1, 300),
        ),
        ("segment_max", LogsemiringCase("segment_max", 1, 20_000, 1, 300)),
        ("log_scan_argmax k=8", LogsemiringCase("log_scan_argmax", 32, 64, 8, 8)),
        ("sample_matmul 4^3", LogsemiringCase("sample_matmul", 1, 4, 4, 4)),
        ("second derivative 24^3", LogsemiringCase("log_matmul_grad_grad", 1, 24, 24, 24)),
        ("gradient 256x(10x10x19)", LogsemiringCase("log_matmul_grad", 256, 10, 10, 19)),
    ):
        peer = "uncertified" if case.op == "log_matmul_grad" else case.baseline
        times = compared(case, peer, "sapwood")
        yield Point(f"   {what} against {peer}", 1, times[peer] / times["sapwood"])


def accuracy() -> Iterator[Point]:
    """The error as a share of what is allowed."""
    for scale in (1.0, 30.0, 100.0, 1e4):
        a, b = cube(256, scale)
        want = torch.cat(
            [torch.logsumexp(r.double()[:, :, None] + b.double(), 1) for r in a.split(32)]
        )
        allowed = 2e-5 + 2**-21 * want.abs()
        share = float(((ops.log_matmul(a, b) - want).abs() / allowed).max())
        yield Point(f"1  256^3 scale {scale:g}: error / bound", 1, share, at_least=False, unit="")
    t = torch.randn(10_000, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = [ops.log_scan(t, torch.zeros(8), reverse=r).double() for r in (False, True)]
    forward, backward = (float(torch.logsumexp(e, 0)) for e in ends)
    yield Point(
        "8  chain of 10^4, relative", 1e-6, abs(forward / backward - 1), at_least=False, unit=""
    )


#: Both passes in a process of their own: growth of the peak resident set, in MiB.
PEAK = """
import gc, pathlib, sys, torch
from sapwood import ops
torch.set_num_threads(1)
side = int(sys.argv[1])
a, b = (torch.randn(side, side, requires_grad=True) for _ in range(2))
torch.autograd.grad(ops.log_matmul(a[:50, :50], b[:50, :50]).sum(), (a, b))
gc.collect()
status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
read = lambda field: next(int(line.split()[1]) for line in status.open() if line.startswith(field))
reset.write_text("5")
before = read("VmRSS:")
torch.autograd.grad(ops.log_matmul(a, b).sum(), (a, b))
print((read("VmHWM:") - before) / 1024)
"""


def memory() -> Iterator[Point]:
    """Output, two gradients, one M x N and 64 MiB, 5 % more."""
    for side, note in ((512, "the broadcast form's joint: 512 MiB"), (4096, "the joint: 256 GiB")):
        command = [sys.executable, "-c", PEAK, str(side)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        allowed = 1.05 * (4 * side * side * 4 / 2**20 + 64)
        yield Point(
            f"20 {side}^3, both passes",
            allowed,
            float(done.stdout),
            at_least=False,
            unit="M",
            note=note,
        )


GROUPS: dict[str, Callable[[], Iterator[Point]]] = {
    "broadcast": broadcast,
    "product": product,
    "exact": exact,
    "small": small,
    "scan": scan,
    "obvious": obvious,
    "accuracy": accuracy,
    "memory": memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    points = chain.from_iterable(GROUPS[name]() for name in options.only)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
