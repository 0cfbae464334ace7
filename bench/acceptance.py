"""Measures the promises of the masked_matmul family: target, measured, PASS or MISS.

``python bench/acceptance.py`` runs every point on one thread, then the scaling on two. ``--json
FILE`` writes the figures, ``--only NAME`` selects groups, ``--quick`` thins the dispatch sweep.
Every figure is a ratio of the fastest of 30 interleaved repeats within this process unless the
point says otherwise; repacking of the input, bias and output transposition are inside the timed
call. The exit status is 1 when a point is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import sweep
import torch
import torch.nn.functional as F
from points import Point, report
from torch import Tensor

import sapwood
from sapwood._measure import interleave
from sapwood.cli.benchmarks.masked_matmul import MaskedMatmulCase, problem_of

REPEATS = 30
SIDE = 2048


def fastest(case: MaskedMatmulCase, providers: Sequence[str]) -> dict[str, float]:
    """Seconds of the fastest repeat, by provider, after a check of each result."""
    calls = {}
    for provider in providers:
        calls[provider] = case.build(provider)
        case.check(provider, calls[provider]())
    with torch.no_grad():
        times = interleave(calls, rounds=REPEATS, seconds=0.5)
    return {name: min(samples) for name, samples in times.items()}


def forward() -> Iterator[Point]:
    """Inference against the premultiplied dense weight."""
    for number, sparsity, batch, provider, target in (
        ("7", 0.9, 1, "sapwood", 4.0),
        ("7", 0.9, 64, "sapwood", 5.0),
        ("7", 0.9, 256, "sapwood", 4.0),
        ("8", 0.95, 64, "sapwood", 9.0),
        ("9", 0.5, 1, "bitmap", 1.4),
    ):
        case = MaskedMatmulCase("packed_linear", SIDE, SIDE, batch, sparsity)
        times = fastest(case, ("dense", provider))
        p = problem_of(case)
        format = "auto" if provider == "sapwood" else provider
        packed = sapwood.ops.pack_sparse(p.weight, p.mask, format=format)
        note = (
            f"dense {times['dense'] * 1e6:.0f} us, runs {sapwood.ops.explain(packed, batch).format}"
        )
        yield Point(
            f"{number} forward s={sparsity:g} B={batch} ({provider})",
            target,
            times["dense"] / times[provider],
            note=note,
        )


def alone() -> Iterator[Point]:
    """Batch 1 with the weight left in the cache: calls of one provider in a row, not in turn."""
    for sparsity, provider, target in (
        (0.5, "sapwood", 1.4),
        (0.5, "bitmap", 1.4),
        (0.8, "sapwood", 1.0),
        (0.9, "sapwood", 4.0),
        (0.95, "sapwood", 1.0),
    ):
        case = MaskedMatmulCase("packed_linear", SIDE, SIDE, 1, sparsity)
        calls = {name: case.build(name) for name in ("dense", provider)}
        best = dict.fromkeys(calls, float("inf"))
        with torch.no_grad():
            for _ in range(5):
                for name, call in calls.items():
                    samples = interleave({name: call}, rounds=REPEATS, seconds=0.1)[name]
                    best[name] = min(best[name], *samples)
        yield Point(
            f"  alone in the cache s={sparsity:g} B=1 ({provider})",
            target,
            best["dense"] / best[provider],
            note=f"dense {best['dense'] * 1e6:.0f} us",
        )


def dispatch(quick: bool = False) -> Iterator[Point]:
    """Automatic choice is never slower than dense by more than 3 % or 5 us."""
    results = list(sweep.run(quick=quick))
    for label, group in (
        ("sparse", [r for r in results if r.format != "dense"]),
        ("dense", [r for r in results if r.format == "dense"]),
    ):
        missed = [r for r in group if not r.passed]
        noise = sum(r.control > 1.0 for r in group)
        yield Point(
            f"10 choices of {label} slower than dense",
            0,
            len(missed),
            at_least=False,
            unit="",
            note=f"{len(group)} points; dense against itself: {noise} of them",
            applies=label == "sparse",  # the other half times one and the same kernel twice
        )
    missed = [r for r in results if not r.passed and r.format != "dense"]
    for r in sorted(missed, key=lambda r: -r.excess)[:10]:
        note = f"{r.sapwood_us:.1f} us, dense {r.dense_us:.1f} us, runs {r.format}"
        yield Point(f"10   {r.name}", 1.0, r.excess, at_least=False, note=note)


def backward() -> Iterator[Point]:
    """Both gradients of the packed path."""
    for op, label, target in (
        ("packed_linear_grad_input", "dX", 4.0),
        ("sampled_matmul", "sampled_matmul", 3.0),
    ):
        times = fastest(MaskedMatmulCase(op, SIDE, SIDE, 64, 0.9), ("dense", "sapwood"))
        note = f"dense {times['dense'] * 1e6:.0f} us"
        yield Point(f"11 {label} s=0.9 B=64", target, times["dense"] / times["sapwood"], note=note)


def packing() -> Iterator[Point]:
    """Packing 2048 x 2048, median."""
    for sparsity in (0.5, 0.9):
        case = MaskedMatmulCase("pack_sparse", SIDE, SIDE, 1, sparsity)
        calls = {name: case.build(name) for name in ("csr", "bitmap", "sell")}
        for name, samples in interleave(calls, rounds=15, seconds=0.5).items():
            median = sorted(samples)[len(samples) // 2] * 1e3
            yield Point(f"12 pack {name} s={sparsity:g}", 40.0, median, at_least=False, unit="ms")


def training() -> Iterator[Point]:
    """Conversion and a training step: s = 0.9, batch 256."""
    case = MaskedMatmulCase("masked_matmul", SIDE, SIDE, 256, 0.9)
    times = fastest(case, ("masked_dense", "sapwood", "sparse_linear"))
    base = times["masked_dense"]
    note = f"F.linear(x, w * m) {base * 1e3:.1f} ms"
    yield Point(
        "12 training step, masked_matmul",
        1.10,
        times["sapwood"] / base,
        at_least=False,
        note=note,
    )
    yield Point("   the same as a speed-up", 1.0, base / times["sapwood"], note="faster than dense")
    yield Point("   training step, SparseLinear", 1.0, base / times["sparse_linear"])
    p = problem_of(case)
    x = p.x.clone().requires_grad_()  # as the input of any layer but the first
    ours = kept_alive(p.weight, lambda w: sapwood.ops.masked_matmul(x, w, p.mask, p.bias))
    theirs = kept_alive(p.weight, lambda w: F.linear(x, w * p.mask, p.bias))
    fewer = (theirs - ours) / p.weight.nbytes
    yield Point("12 weight-sized tensors less kept for backward", 1.0, fewer, unit="")


def kept_alive(weight: Tensor, forward: Callable[[Tensor], Tensor]) -> int:
    """Bytes that autograd saves for backward, beside the weight itself."""
    leaf = weight.clone().requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(leaf)
    saved.pop(leaf.untyped_storage().data_ptr(), None)
    del y
    return sum(saved.values())


def memory() -> Iterator[Point]:
    """Bytes of a packed weight against the dense one."""
    for sparsity, target in ((0.5, 0.54), (0.9, 0.16)):
        p = problem_of(MaskedMatmulCase("pack_sparse", SIDE, SIDE, 1, sparsity))
        packed = sapwood.ops.pack_sparse(p.weight, p.mask, keep="memory")
        share = packed.nbytes() / p.weight.nbytes
        note = f"keeps {', '.join(packed.formats)}"
        yield Point(
            f"13 bytes at s={sparsity:g}, keep=memory",
            target,
            share,
            at_least=False,
            note=note,
        )


def scaling() -> Iterator[Point]:
    """Two threads gain 1.6x on one wherever dense does."""
    seconds: dict[int, dict[tuple[float, int], dict[str, float]]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds[threads] = {
            (s, b): fastest(
                MaskedMatmulCase("packed_linear", SIDE, SIDE, b, s), ("dense", "sapwood")
            )
            for s, b in ((0.9, 1), (0.9, 64), (0.9, 256), (0.95, 64))
        }
    torch.set_num_threads(1)
    for (s, b), one in seconds[1].items():
        two = seconds[2][s, b]
        dense, ours = (one[name] / two[name] for name in ("dense", "sapwood"))
        note = f"dense scales {dense:.2f}x; {two['dense'] / two['sapwood']:.2f}x dense on 2 threads"
        yield Point(
            f"   two threads / one, s={s:g} B={b}", 1.6, ours, note=note, applies=dense >= 1.6
        )


GROUPS: dict[str, Callable[[], Iterator[Point]]] = {
    "forward": forward,
    "alone": alone,
    "backward": backward,
    "packing": packing,
    "training": training,
    "memory": memory,
    "scaling": scaling,
    "dispatch": dispatch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="thin out the dispatch sweep")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = sapwood.ops.calibrate(seconds=3.0, force=True)
    print(f"dispatch table: {table.source}")
    groups: dict[str, Callable[[], Iterator[Point]]]
    groups = {**GROUPS, "dispatch": partial(dispatch, options.quick)}
    points = chain.from_iterable(groups[name]() for name in options.only)
    return 1 if report(points, options.json) else 0


if __name__ == "__main__":
    raise SystemExit(main())
