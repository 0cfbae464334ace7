"""Packs a trained network, checks that it computes the same, and times it against dense."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from sapwood import nn as sparse_nn
from sapwood import ops
from sapwood._measure import Call, interleave
from sapwood.cli.console import Bars

BATCHES = (1, 64, 256)
SAME = 0.03  # a difference of speed below this is noise
QUIET = 0.9  # share of the time below which other programs disturbed a measurement
_PIECE = 1024  # images at once
_PATIENCE = 3  # times the given seconds: how long to wait for a quieter moment


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer."""

    report: sparse_nn.LayerReport
    formats: dict[int, str]  # batch size -> format that runs


@dataclass(frozen=True)
class Packed:
    """A packed copy of a network and its difference from the original."""

    model: nn.Module
    layers: list[Layer]
    max_difference: float  # of the outputs over the whole test set
    largest_output: float  # of the original, in absolute value
    same_predictions: int
    predictions: int

    @property
    def bytes_dense(self) -> int:
        return sum(layer.report.bytes_before for layer in self.layers)

    @property
    def bytes_packed(self) -> int:
        return sum(layer.report.bytes_after for layer in self.layers)


@dataclass(frozen=True)
class Timing:
    """Seconds per forward pass of several networks at one batch size, taken in turns."""

    batch: int
    best: dict[str, float]  # name -> shortest
    median: dict[str, float]
    undisturbed: float = 1.0  # 1 - time lost to other programs, summed over threads / time

    def speedup(self, name: str, baseline: str = "dense") -> float:
        return self.best[baseline] / self.best[name]


def pack(model: nn.Module, inputs: Tensor) -> Packed:
    """Packs a copy of ``model`` and compares the two on ``inputs`` (n, features).

    Raises:
        ArithmeticError: when the outputs differ by more than rounding explains.
    """
    model = copy.deepcopy(model).eval()
    packed = copy.deepcopy(model)
    rows = sparse_nn.to_sparse(packed)
    with torch.no_grad():  # in pieces: convolutions make the images many times as large
        expected, actual = (
            torch.cat([network(part) for part in inputs.split(_PIECE)])
            for network in (model, packed)
        )
    difference = float((actual - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= 1e-4 * max(1.0, largest):
        raise ArithmeticError(
            f"packed and masked outputs differ by {difference:.1e}, the largest is {largest:.1e}"
        )
    return Packed(
        packed,
        [_layer(packed, row) for row in rows],
        difference,
        largest,
        int((actual.argmax(1) == expected.argmax(1)).sum()),
        len(inputs),
    )


def _layer(model: nn.Module, row: sparse_nn.LayerReport) -> Layer:
    module = model.get_submodule(row.name)
    if not isinstance(module, sparse_nn.SparseLinear):
        return Layer(row, dict.fromkeys(BATCHES, "dense"))
    weight = module.packed()
    return Layer(row, {batch: ops.explain(weight, batch).format for batch in BATCHES})


def time_models(
    models: Mapping[str, nn.Module], inputs: Tensor, bars: Bars, *, seconds: float = 1.0
) -> list[Timing]:
    """Times whole forward passes at each batch size; within a size the networks take turns.

    Args:
        models: name -> network in evaluation mode; one of them is named "dense".
        inputs: (n, features); repeated where a batch is larger.
        bars: where progress is shown.
        seconds: spent per batch size; up to three times as much while other programs disturb.

    Returns:
        One entry per batch size.
    """
    timings = []
    bars.start("timing")
    for index, batch in enumerate(BATCHES):
        bars.step(index, len(BATCHES), f"batch {batch}")
        rows = torch.arange(batch) % len(inputs)
        x = inputs[rows].contiguous()  # (batch, features)
        calls = {name: (lambda model=model, x=x: model(x)) for name, model in models.items()}
        attempts: list[Timing] = []
        deadline = time.perf_counter() + _PATIENCE * seconds
        with torch.no_grad():
            while not attempts or (
                not any(map(quiet, attempts)) and time.perf_counter() < deadline
            ):
                attempts.append(_attempt(calls, batch, seconds))
        timings.append(max(attempts, key=lambda timing: timing.undisturbed))
    bars.step(len(BATCHES), len(BATCHES), "")
    return timings


def _attempt(calls: Mapping[str, Call], batch: int, seconds: float) -> Timing:
    """One measurement, and how much of it other programs took."""
    start, lost = time.perf_counter(), _seconds_lost()
    times = interleave(calls, rounds=10, seconds=seconds)
    wall = time.perf_counter() - start
    share = max(0.0, 1 - (_seconds_lost() - lost) / wall)
    best = {name: min(samples) for name, samples in times.items()}
    return Timing(batch, best, {name: median(s) for name, s in times.items()}, share)


def _seconds_lost() -> float:
    """How long this process's threads were ready to run while others had the processor.

    Linux counts it; elsewhere nothing is known and nothing is claimed: 0.
    """
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that ended meanwhile
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


def quiet(timing: Timing) -> bool:
    """Whether a measurement was undisturbed enough to state its ratio."""
    return timing.undisturbed >= QUIET


def ratio(speedup: float) -> str:
    """A speed-up with the digits that matter.

    >>> ratio(11.31), ratio(5.234), ratio(0.957)
    ('11x', '5.2x', '0.96x')
    """
    digits = 0 if speedup >= 9.95 else 1 if speedup >= 1.5 else 2
    return f"{speedup:.{digits}f}x"


def remarks(timings: Sequence[Timing], names: Sequence[str]) -> list[str]:
    """Sentences on what did not pay, and on what was hard to measure; none when all is well."""
    lines = []
    even = [
        f"{name} at batch {timing.batch} ({ratio(timing.speedup(name))})"
        for name in names
        for timing in timings
        if timing.speedup(name) < 1 + SAME
    ]
    if even:
        lines.append(f"Not faster than dense here: {', '.join(even)}.")
    disturbed = [str(timing.batch) for timing in timings if not quiet(timing)]
    if disturbed:
        lines.append(
            "Other programs used the processor during the timing: the figures at batch "
            f"{', '.join(disturbed)} are rough."
        )
    return lines


def as_data(packed: Packed, timings: Sequence[Timing], name: str) -> dict[str, object]:
    """The measured figures as plain data for a JSON report."""
    return {
        "max_difference": packed.max_difference,
        "largest_output": packed.largest_output,
        "same_predictions": packed.same_predictions,
        "predictions": packed.predictions,
        "bytes_dense": packed.bytes_dense,
        "bytes_packed": packed.bytes_packed,
        "layers": [
            {
                "name": layer.report.name,
                "shape": list(layer.report.shape),
                "sparsity": layer.report.sparsity,
                "packed": layer.report.packed,
                "reason": layer.report.reason,
                "format_by_batch": layer.formats,
            }
            for layer in packed.layers
        ],
        "timings": [
            {
                "batch": timing.batch,
                "dense_seconds": timing.best["dense"],
                "packed_seconds": timing.best[name],
                "dense_median_seconds": timing.median["dense"],
                "packed_median_seconds": timing.median[name],
                "speedup": timing.speedup(name),
                "undisturbed": timing.undisturbed,
            }
            for timing in timings
        ],
    }
