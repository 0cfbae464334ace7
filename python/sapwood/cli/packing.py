"""Packs a trained network, checks that it computes the same, and times it against dense."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from sapwood import nn as sparse_nn
from sapwood import ops
from sapwood._measure import interleave

BATCHES = (1, 64, 256)
SAME = 0.03  # a difference of speed below this is noise


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
    with torch.no_grad():
        expected, actual = model(inputs), packed(inputs)
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
    models: Mapping[str, nn.Module], inputs: Tensor, *, seconds: float = 1.0
) -> list[Timing]:
    """Times whole forward passes at each batch size; within a size the networks take turns.

    Args:
        models: name -> network in evaluation mode; one of them is named "dense".
        inputs: (n, features); repeated where a batch is larger.
        seconds: spent per batch size.

    Returns:
        One entry per batch size.
    """
    timings = []
    for batch in BATCHES:
        rows = torch.arange(batch) % len(inputs)
        x = inputs[rows].contiguous()  # (batch, features)
        calls = {name: (lambda model=model, x=x: model(x)) for name, model in models.items()}
        with torch.no_grad():
            times = interleave(calls, rounds=30, seconds=seconds)
        best = {name: min(samples) for name, samples in times.items()}
        timings.append(Timing(batch, best, {name: median(s) for name, s in times.items()}))
    return timings


def ratio(speedup: float) -> str:
    """A speed-up with the digits that matter.

    >>> ratio(11.31), ratio(5.234), ratio(0.957)
    ('11x', '5.2x', '0.96x')
    """
    digits = 0 if speedup >= 9.95 else 1 if speedup >= 1.5 else 2
    return f"{speedup:.{digits}f}x"


def remarks(timings: Sequence[Timing], names: Sequence[str]) -> list[str]:
    """One sentence on the batch sizes at which packing did not pay; none when it always did."""
    even = [
        f"{name} at batch {timing.batch} ({ratio(timing.speedup(name))})"
        for name in names
        for timing in timings
        if timing.speedup(name) < 1 + SAME
    ]
    return [f"Not faster than dense here: {', '.join(even)}."] if even else []


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
            }
            for timing in timings
        ],
    }
