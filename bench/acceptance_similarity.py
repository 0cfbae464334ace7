"""The promises of the similarity family: target, measured, PASS or MISS.

    python bench/acceptance_similarity.py [--threads 1] [--only pairs topk ...] [--json FILE]

Ratios are taken within one process, the fastest of interleaved runs on each side. Memory is the
growth of the peak resident set in a child process that runs one call, over inputs and results. The
full-matrix way is timed twice: allocating its product, as a user would write it, and into a buffer
that exists already; the target is meant against the first, the second is reported beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from points import Point, report
from torch import Tensor

import sapwood

N, D, THRESHOLD = 20_000, 256, 0.9
PLANTED = 2_000
PROBES, UNITS = 4096, 300  # activations of a layer: its units are the columns
GROUPS_OF_COPIES = 50

Inputs = tuple[Tensor, ...]


def rows_of(n: int, d: int, planted: int = PLANTED) -> Tensor:
    """Random rows; the last ones are noisy copies of the first, on both sides of the threshold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    planted = min(planted, n // 2)
    noise = torch.linspace(0.0, 1.0, planted)[:, None]  # cosines from 1 down to about 0.7
    x[n - planted :] = x[:planted] + noise * torch.randn(planted, d, generator=generator)
    return x


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some interleaved runs, each after every other."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def exact_pairs(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The pairs in float64 by blocks, and those within 1e-6 of the threshold: (E, 2) each."""
    unit = torch.nn.functional.normalize(x.double())
    sure: list[Tensor] = []
    near: list[Tensor] = []
    for first in range(0, len(x), 2000):
        s = unit[first : first + 2000] @ unit.T
        for found, mask in ((sure, s >= threshold), (near, (s - threshold).abs() <= 1e-6)):
            row, col = mask.triu(first + 1).nonzero(as_tuple=True)
            found.append(torch.stack([row + first, col], 1))
    return torch.cat(sure), torch.cat(near)


def pairs(rounds: int) -> Iterator[Point]:
    """20 000 rows, threshold 0.9."""
    x = rows_of(N, D)
    found = sapwood.ops.similarity_pairs(x, threshold=THRESHOLD)
    sure, near = exact_pairs(x, THRESHOLD)

    def codes(p: Tensor) -> set[int]:
        return set((p[:, 0] * N + p[:, 1]).tolist())

    got = codes(torch.stack([found.row, found.col], 1))
    wrong = (got ^ codes(sure)) - codes(near)
    note = f"{len(found)} pairs, {len(near)} within 1e-6 of the threshold"
    yield Point(
        "2 pairs that differ from float64", 0, len(wrong), unit="", note=note, at_least=False
    )
    buffer = torch.empty(N, N)
    unit = torch.nn.functional.normalize(x)
    times = fastest(
        {
            "sapwood": lambda: sapwood.ops.similarity_pairs(x, threshold=THRESHOLD),
            "allocating": lambda: (unit @ unit.T >= THRESHOLD).nonzero(),
            "buffer": lambda: (torch.mm(unit, unit.T, out=buffer) >= THRESHOLD).nonzero(),
        },
        rounds,
    )
    ours = times["sapwood"]
    note = f"{ours:.2f} s against {times['allocating']:.2f} s"
    yield Point(
        "10 time / X @ X.T + nonzero",
        0.65,
        ours / times["allocating"],
        note=note,
        at_least=False,
    )
    yield Point("10 the same, stretch", 0.30, ours / times["allocating"], at_least=False)
    note = f"against {times['buffer']:.2f} s"
    yield Point(
        "10 time / the same into a buffer, stretch",
        0.55,
        ours / times["buffer"],
        note=note,
        at_least=False,
    )


def memory(rounds: int) -> Iterator[Point]:
    """Memory beyond inputs and results."""
    for name in ("pairs", "topk"):
        yield Point(
            f"10 extra memory, {name}",
            64.0,
            peak_in_child(name, N, D).extra,
            unit=" MB",
            at_least=False,
        )


def dense(rounds: int) -> Iterator[Point]:
    """A threshold that keeps 5 % of the pairs."""
    n = 8000
    x = rows_of(n, D)
    unit = torch.nn.functional.normalize(x)
    threshold = dense_threshold(x)
    times = fastest(
        {
            "sapwood": lambda: sapwood.ops.similarity_pairs(x, threshold=threshold),
            "full": lambda: (unit @ unit.T >= threshold).triu_(1).nonzero(),
        },
        rounds,
    )
    yield Point(
        "11 5 % of the pairs, time / full", 1.0, times["sapwood"] / times["full"], at_least=False
    )
    count = len(sapwood.ops.similarity_pairs(x, threshold=threshold))
    bytes_each = peak_in_child("dense", n, D).total * 1e6 / count
    note = f"{count} pairs, 20 bytes of each are the result; nothing taken off"
    yield Point(
        "11 bytes per reported pair",
        30 + 64e6 / count,
        bytes_each,
        unit=" B",
        note=note,
        at_least=False,
    )


def topk(rounds: int) -> Iterator[Point]:
    """The ten best of 20 000."""
    x = rows_of(N, D)
    unit = torch.nn.functional.normalize(x)

    def chunked(size: int) -> None:
        for first in range(0, N, size):
            torch.topk(unit[first : first + size] @ unit.T, 10)

    calls = {f"{c}": (lambda c=c: chunked(c)) for c in (256, 1024, 4096)}
    times = fastest({**calls, "sapwood": lambda: sapwood.ops.similarity_topk(x, 10)}, rounds)
    best = min(times[c] for c in calls)
    note = f"{times['sapwood']:.2f} s against {best:.2f} s"
    yield Point(
        "12 k = 10, time / best chunked topk",
        0.85,
        times["sapwood"] / best,
        note=note,
        at_least=False,
    )
    values, indices = sapwood.ops.similarity_topk(x, 10)
    sample = torch.arange(0, N, 40)
    wide = torch.nn.functional.normalize(x.double())
    s = wide[sample] @ wide.T
    s[torch.arange(len(sample)), sample] = -torch.inf
    lost = (s.topk(10).values - s.gather(1, indices[sample])).abs().max()
    note = f"values within {float((values[sample] - s.gather(1, indices[sample])).abs().max()):.0e}"
    yield Point(
        "3 top-k short of float64, 500 rows", 1e-12, float(lost), unit="", note=note, at_least=False
    )


def scale(rounds: int) -> Iterator[Point]:
    """100 000 rows, the ten best, in bounded memory."""
    x = rows_of(100_000, D)
    start = time.perf_counter()
    sapwood.ops.similarity_topk(x, 10)
    seconds = time.perf_counter() - start
    extra = peak_in_child("topk", 100_000, D).extra
    yield Point(
        "top 10 of 100 000, extra memory",
        512.0,
        extra,
        unit=" MB",
        note=f"{seconds:.0f} s",
        at_least=False,
    )


def matrices(rounds: int) -> Iterator[Point]:
    """Small matrices."""
    for n in (300, 1000):
        x = rows_of(n, D)

        def plain(x: Tensor = x) -> Tensor:
            unit = torch.nn.functional.normalize(x)
            return unit @ unit.T

        def ours(x: Tensor = x) -> Tensor:
            return sapwood.ops.similarity_matrix(x)

        times = fastest({"sapwood": ours, "plain": plain}, 40 * rounds)
        yield Point(
            f"13 matrix of {n} rows", 1.05, times["sapwood"] / times["plain"], at_least=False
        )
    megabytes = PROBES * UNITS * 4 / 1e6
    extra = peak_in_child("transposed", PROBES, UNITS).extra
    note = f"{extra:.1f} MB for {megabytes:.1f} MB of input, {PROBES} x {UNITS}"
    yield Point(
        "13 transposed correlation, memory",
        1.0,
        extra / megabytes,
        note=note,
        at_least=False,
    )


def cka(rounds: int) -> Iterator[Point]:
    """Linear CKA against its three products."""
    x, y = torch.randn(50_000, 512), torch.randn(50_000, 512)
    times = fastest(
        {
            "sapwood": lambda: sapwood.ops.linear_cka(x, y),
            "products": lambda: (x.T @ y, x.T @ x, y.T @ y),
        },
        rounds,
    )
    yield Point(
        "14 linear_cka / three products", 1.3, times["sapwood"] / times["products"], at_least=False
    )
    peak = peak_in_child("cka", 50_000, 512)
    note = "N x N has 10 000 MB"
    yield Point(
        "14 linear_cka, extra memory", 64.0, peak.extra, unit=" MB", note=note, at_least=False
    )


def clusters(rounds: int) -> Iterator[Point]:
    """Clusters cost what the pairs cost."""
    x = rows_of(50_000, 128)
    times = fastest(
        {
            "clusters": lambda: sapwood.ops.similarity_clusters(x, threshold=THRESHOLD),
            "pairs": lambda: sapwood.ops.similarity_pairs(x, threshold=THRESHOLD),
        },
        rounds,
    )
    yield Point(
        "15 clusters / pairs, 50 000 rows", 1.1, times["clusters"] / times["pairs"], at_least=False
    )
    sizes = (25_000, 50_000, 100_000)
    extras = [peak_in_child("clusters", n, 128).extra for n in sizes]
    edges = [n * (n // GROUPS_OF_COPIES - 1) // 2 for n in sizes]
    for at in (1, 2):
        note = f"{extras[at]:.1f} MB at {sizes[at]} rows with {edges[at] / 1e6:.0f} million edges"
        growth = extras[at] / extras[at - 1]
        yield Point(
            "15 clusters, memory of twice the rows",
            2.1,
            growth,
            note=note,
            at_least=False,
        )


def copies_of(n: int, d: int) -> Tensor:
    """Few distinct rows, each many times: the edges among them grow with the square of n."""
    return rows_of(GROUPS_OF_COPIES, d, 0).repeat(n // GROUPS_OF_COPIES, 1)


def dense_threshold(x: Tensor) -> float:
    """What 5 % of the pairs reach."""
    unit = torch.nn.functional.normalize(x[:2000])
    return float(torch.quantile((unit[:1000] @ unit[1000:].T).flatten(), 0.95))


#: Inputs of n rows and d columns, and the call whose memory is measured.
CHILDREN: dict[str, tuple[Callable[[int, int], Inputs], Callable[[Inputs], Sequence[Tensor]]]] = {
    "pairs": (
        lambda n, d: (rows_of(n, d),),
        lambda x: tuple(sapwood.ops.similarity_pairs(*x, threshold=THRESHOLD)),
    ),
    "topk": (lambda n, d: (rows_of(n, d),), lambda x: sapwood.ops.similarity_topk(x[0], 10)),
    "dense": (
        lambda n, d: (x := rows_of(n, d), torch.tensor(dense_threshold(x))),
        lambda x: tuple(sapwood.ops.similarity_pairs(x[0], threshold=float(x[1]))),
    ),
    "transposed": (
        lambda n, d: (rows_of(n, d),),
        lambda x: (sapwood.ops.similarity_matrix(x[0].T, kind="correlation"),),
    ),
    "cka": (
        lambda n, d: (torch.randn(n, d), torch.randn(n, d)),
        lambda x: (sapwood.ops.linear_cka(*x),),
    ),
    "clusters": (
        lambda n, d: (copies_of(n, d),),
        lambda x: (sapwood.ops.similarity_clusters(*x, threshold=THRESHOLD),),
    ),
}


@dataclass(frozen=True)
class Peak:
    """Megabytes by which a call raised the peak of its process: in all, and beyond the results."""

    total: float
    extra: float


def peak_in_child(name: str, n: int, d: int) -> Peak:
    """Peak memory of a call beyond its inputs, in a process of its own."""
    child = (name, str(n), str(d), str(torch.get_num_threads()))
    command = (sys.executable, __file__, "--child", *child)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Peak(**json.loads(output))


def measure_child(name: str, n: int, d: int) -> Peak:
    build, call = CHILDREN[name]
    call(build(2000, d))  # threads and libraries exist
    inputs = build(n, d)
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = kib("VmRSS")
    results = call(inputs)
    total = (kib("VmHWM") - before) * 1024 / 1e6
    return Peak(total, total - sum(t.nbytes for t in results) / 1e6)


def give_back_free_memory() -> None:
    """Frees what the allocator keeps, or the call would seem to need less than it does."""
    ctypes.CDLL(None).malloc_trim(0)


GROUPS: dict[str, Callable[[int], Iterator[Point]]] = {
    "pairs": pairs,
    "memory": memory,
    "dense": dense,
    "topk": topk,
    "matrices": matrices,
    "cka": cka,
    "clusters": clusters,
    "scale": scale,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        name, n, d, threads = options.child
        torch.set_num_threads(int(threads))
        print(json.dumps(asdict(measure_child(name, int(n), int(d)))))
        return 0
    torch.set_num_threads(options.threads)
    points = chain.from_iterable(GROUPS[name](options.rounds) for name in options.only)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
