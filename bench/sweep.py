"""The dispatch sweep: the automatic choice against dense over sparsities, batches and shapes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import sapwood
from sapwood._measure import interleave
from sapwood.cli.benchmarks.masked_matmul import SHAPES, MaskedMatmulCase, problem_of

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 4, 16, 64, 256, 1024)
RUNS = 3
ALLOWED_RATIO = 1.03
ALLOWED_SECONDS = 5e-6


@dataclass(frozen=True)
class Result:
    """One point: seconds are those of the run whose excess is the median of all runs."""

    name: str
    format: str
    dense_us: float
    sapwood_us: float
    excess: float  # time / the time that is allowed; above 1 is a miss
    control: float  # the same for a second, identical dense call: what noise alone makes of it

    @property
    def passed(self) -> bool:
        return self.excess <= 1.0


def run(*, quick: bool = False) -> Iterator[Result]:
    """Measures every point; ``quick`` leaves out the largest batch and every second sparsity."""
    sparsities = SPARSITIES[::2] if quick else SPARSITIES
    batches = BATCHES[:-1] if quick else BATCHES
    for n, k in SHAPES:
        for sparsity in sparsities:
            packed = None
            for batch in batches:
                case = MaskedMatmulCase("packed_linear", n, k, batch, sparsity)
                p = problem_of(case)
                if packed is None:
                    packed = sapwood.ops.pack_sparse(p.weight, p.mask, keep="speed")
                yield _point(case, packed)


def _point(case: MaskedMatmulCase, packed: sapwood.ops.PackedWeight) -> Result:
    p = problem_of(case)
    # Two weights of 16 MB compete for one cache and differ by tens of percent at batch 1, whatever
    # reads them. Where both sides run dense torch they therefore read the same one.
    weight = packed.layouts.get("dense", {"weight": p.product})["weight"]
    calls = {
        "dense": lambda: F.linear(p.x, weight, p.bias),
        "control": lambda: F.linear(p.x, weight, p.bias),  # how far dense misses against itself
        "sapwood": lambda: sapwood.ops.packed_linear(p.x, packed, p.bias),
    }
    case.check("sapwood", calls["sapwood"]())
    runs, controls = [], []
    with torch.no_grad():
        for seed in range(RUNS):
            times = interleave(calls, rounds=7, seconds=0.05, seed=seed)
            dense, ours, control = (min(times[name]) for name in ("dense", "sapwood", "control"))
            allowed = max(ALLOWED_RATIO * dense, dense + ALLOWED_SECONDS)
            runs.append((ours / allowed, dense, ours))
            controls.append(control / allowed)
    excess, dense, ours = statistics.median_low(runs)
    return Result(
        name=case.name,
        format=sapwood.ops.explain(packed, case.batch).format,
        dense_us=dense * 1e6,
        sapwood_us=ours * 1e6,
        excess=excess,
        control=statistics.median_low(controls),
    )
