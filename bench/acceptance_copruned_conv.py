"""The speed promises of the copruned_conv family: target, measured, PASS or MISS.

    python bench/acceptance_copruned_conv.py [--threads 1] [--only main curve ...] [--json FILE]

Ratios are taken within one process, the fastest of interleaved runs on each side. The baseline is
the faster of F.conv2d on a contiguous and on a channels-last input, with bias and ReLU in place;
ours includes lists, zeros, borders and packing of the weight. The masks are random and different
for every sample; every sample keeps the same number of tiles. One thread is timed by processor
time, which other programs on the machine disturb less, more threads by the clock. Memory is the
growth of the peak resident set in a child process that runs one call, over inputs and result.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from points import Point, report

import sapwood
from sapwood._measure import Call
from sapwood.cli.benchmarks.copruned_conv import ConvCase, problem_of

MAIN = ConvCase("copruned_conv2d", 8, 64, 64, 56, 3, 0.3)
LAYOUTS = ("channels_last", "contiguous")


def fastest(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some interleaved runs, each after every other."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def versus_dense(case: ConvCase, rounds: int) -> tuple[float, str]:
    """How many times faster than the faster layout of dense torch, and the times."""
    calls = {name: case.build(name) for name in (*LAYOUTS, "sapwood")}
    with torch.no_grad():
        times = fastest(calls, rounds)
    layout = min(LAYOUTS, key=times.__getitem__)
    note = f"{times['sapwood'] * 1e3:.2f} ms against {times[layout] * 1e3:.2f} ms ({layout})"
    return times[layout] / times["sapwood"], note


def point(name: str, target: float, case: ConvCase, rounds: int) -> Point:
    ratio, note = versus_dense(case, rounds)
    return Point(name, target, ratio, note=note)


def main_points(rounds: int) -> Iterator[Point]:
    """70 % of the work cut, by regions and jointly."""
    for name, case in (("regions", MAIN), ("joint", replace(MAIN, keep=0.6, filters_kept=0.5))):
        ratio, note = versus_dense(case, rounds)
        yield Point(f"9 70 % cut, {name}", 2.3, ratio, note=note)
        yield Point("9 the same, stretch", 2.8, ratio)


def shapes(rounds: int) -> Iterator[Point]:
    """Other cuts, batch 1, small tiles, more channels."""
    yield point("10 50 % cut", 1.6, replace(MAIN, keep=0.5), rounds)
    yield point("10 85 % cut", 4.2, replace(MAIN, keep=0.15), rounds)
    yield point("10 batch 1, 70 %", 2.1, replace(MAIN, batch=1), 4 * rounds)
    yield point("11 tile 4, 70 %", 2.1, replace(MAIN, tile=4), rounds)
    wide = replace(MAIN, channels=128, filters=128, size=28)
    yield point("11 128-128 28x28, 70 %", 2.2, wide, rounds)


def stacked(rounds: int) -> Iterator[Point]:
    """The second of two layers, half of the groups on both sides."""
    p = problem_of(MAIN)
    groups = torch.rand(8, 1, 4, generator=torch.Generator().manual_seed(2))
    half = sapwood.ops.tile_mask(groups, keep=0.5)[:, 0]

    def second() -> None:
        sapwood.ops.copruned_conv2d(
            p.x,
            p.weight,
            p.bias,
            None,
            half.flip(1),
            padding=1,
            input_filter_mask=half,
            activation="relu",
        )

    times = fastest({**{n: MAIN.build(n) for n in LAYOUTS}, "sapwood": second}, rounds)
    best = min(times[n] for n in LAYOUTS)
    note = f"{times['sapwood'] * 1e3:.2f} ms against {best * 1e3:.2f} ms"
    yield Point("11 second of a pair, half of the groups", 3.2, best / times["sapwood"], note=note)


def curve(rounds: int) -> Iterator[Point]:
    """Never below 0.95x of dense, whatever is cut."""
    for cut in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        ratio, note = versus_dense(replace(MAIN, keep=1 - cut), rounds)
        yield Point(f"curve, {cut:.0%} cut", 0.95, ratio, note=note)


def others(rounds: int) -> Iterator[Point]:
    """Nothing cut, depthwise, the LSTM step."""
    ratio, note = versus_dense(replace(MAIN, keep=1.0), 2 * rounds)
    yield Point("12 all kept, time / dense", 1.05, 1 / ratio, note=note, at_least=False)
    deep = ConvCase("copruned_depthwise_conv2d", 8, 128, 128, 56, 7, 0.3)
    yield point("12 depthwise 7x7, 70 %", 1.8, deep, rounds)
    cell = ConvCase("copruned_conv_lstm_step", 8, 64, 256, 32, 5, 0.3)
    yield point("13 ConvLSTM step, 70 % skipped", 2.2, cell, max(3, rounds // 3))


def backward(rounds: int) -> Iterator[Point]:
    """Gradients of input and weight."""
    case = replace(MAIN, op="copruned_conv2d_backward")
    yield point("14 backward, 70 %", 1.8, case, rounds)
    joint = replace(case, keep=0.6, filters_kept=0.5)
    yield point("14 backward, joint", 1.8, joint, rounds)


def memory(rounds: int) -> Iterator[Point]:
    """Memory beyond inputs, result and list; one thread."""
    for name in CHILDREN:
        extra = extra_in_child(name)
        yield Point(f"15 extra memory, {name}", 1.05, extra, unit=" MB", at_least=False)


CHILDREN: dict[str, ConvCase] = {
    "64-64 3x3": MAIN,
    "128-128 28x28": replace(MAIN, channels=128, filters=128, size=28),
    "64-64 1x1": replace(MAIN, kernel=1),
    "depthwise 7x7": ConvCase("copruned_depthwise_conv2d", 8, 128, 128, 56, 7, 0.3),
}


def extra_in_child(name: str) -> float:
    """Megabytes beyond the result that a call needs, in a process of its own."""
    command = (sys.executable, __file__, "--child", name)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_child(name: str) -> float:
    """The packed weight of a raw weight is counted apart: a module keeps it between calls."""
    case = CHILDREN[name]
    tiny = replace(case, batch=1, size=8)
    tiny.build("sapwood")()  # threads and libraries exist
    p = problem_of(case)
    packed = p.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = kib("VmRSS")
    y = sapwood.ops.copruned_conv2d(
        p.x, packed, p.bias, p.region, padding=p.half, groups=p.groups, activation="relu"
    )
    return (kib("VmHWM") - before) * 1024 / 1e6 - y.nbytes / 1e6


GROUPS: dict[str, Callable[[int], Iterator[Point]]] = {
    "main": main_points,
    "shapes": shapes,
    "stacked": stacked,
    "curve": curve,
    "others": others,
    "backward": backward,
    "memory": memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        print(measure_child(options.child))
        return 0
    points = chain.from_iterable(GROUPS[name](options.rounds) for name in options.only)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
