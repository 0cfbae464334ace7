"""Chapter: a convolution whose samples keep their own regions, against torch with masks."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import sapwood
from sapwood._measure import interleave
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.report.page import Chapter, Section, Stat, Table

TITLE = "Skipped regions"
CHANNELS, SIZE, TILE = 64, 56, 8
CUTS = (0.0, 0.5, 0.7, 0.85)
SHOWN = 0.7
OURS, DENSE, MASKED = "copruned_conv2d", "F.conv2d", "F.conv2d, masked"


@dataclass(frozen=True)
class Measured:
    """Figures for every share of the tiles that is cut, and how exact our way is."""

    batch: int
    seconds: dict[float, dict[str, float]]  # the fastest of each way
    speedups: dict[float, float]  # over dense torch, the median of the rounds
    error: float  # relative to the masked convolution in float64


def run(context: Context) -> ChapterResult:
    """Times one convolution with four shares of its tiles cut; some seconds."""
    m = _measure(context)
    times = f"{m.speedups[SHOWN]:.1f}x as fast as dense torch"
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_section(m)]),
        headline=f"With {SHOWN:.0%} of its regions skipped, a convolution ran {times}.",
        stats=[Stat(f"{m.speedups[SHOWN]:.1f}x", f"as fast as F.conv2d with {SHOWN:.0%} skipped")],
        summary=_table(m),
        remarks=[f"Within {m.error:.0e} of the masked convolution in float64."],
        facts=[
            (
                "Skipped regions",
                f"batch {m.batch}, {CHANNELS} channels, 3 x 3, {SIZE} x {SIZE} pixels, "
                f"random tiles of {TILE} x {TILE}, different for every sample",
            )
        ],
        data={
            "batch": m.batch,
            "error": m.error,
            "seconds": {f"{cut:g}": times for cut, times in m.seconds.items()},
            "speedup": m.speedups[SHOWN],
        },
    )


def _measure(context: Context) -> Measured:
    batch = 2 if context.quick else 8
    g = torch.Generator().manual_seed(context.seed)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=g)
    x = x.contiguous(memory_format=torch.channels_last)
    layer = sapwood.nn.CoPrunedConv2d(CHANNELS, CHANNELS, 3, padding=1, tile=TILE)
    score = torch.rand(batch, SIZE // TILE, SIZE // TILE, generator=g)
    seconds, speedups, error = {}, {}, 0.0
    with torch.no_grad():
        for cut in CUTS:
            mask = sapwood.ops.tile_mask(score, keep=1 - cut)
            times, off = _time(layer, x, mask, rounds=7 if context.quick else 15)
            seconds[cut] = {name: min(samples) for name, samples in times.items()}
            rounds = zip(times[DENSE], times[OURS], strict=True)
            speedups[cut] = statistics.median(dense / ours for dense, ours in rounds)
            error = max(error, off)
    return Measured(batch, seconds, speedups, error)


def _time(
    layer: sapwood.nn.CoPrunedConv2d, x: torch.Tensor, mask: torch.Tensor, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each way in each round, and how far ours is from float64."""
    bias = layer.bias
    pixels = mask.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)[:, None].float()

    def dense() -> torch.Tensor:
        return F.conv2d(x, layer.weight, bias, padding=1)

    exact = F.conv2d(
        x.double(), layer.weight.double(), None if bias is None else bias.double(), padding=1
    )
    exact = exact * pixels
    difference = (layer(x, mask).double() - exact).norm() / exact.norm()
    samples = interleave(
        {DENSE: dense, MASKED: lambda: dense() * pixels, OURS: lambda: layer(x, mask)},
        rounds=rounds,
        seconds=0.0,
    )
    return samples, float(difference)


def _lead(m: Measured) -> str:
    return (
        "A network that multiplies its results by masks saves nothing: everything is computed "
        f"first. Here {m.batch} images of a batch each keep their own regions, and what is not "
        "kept is not computed."
    )


def _section(m: Measured) -> Section:
    return Section(
        "Less work, less time",
        [
            "All ways give the same numbers where a mask is on. Where nothing is skipped, the op "
            "calls dense torch."
        ],
        [_table(m)],
    )


def _table(m: Measured) -> Table:
    rows = [
        [
            f"{cut:.0%}",
            *(f"{1e3 * m.seconds[cut][way]:.2f} ms" for way in (DENSE, MASKED, OURS)),
            f"{m.speedups[cut]:.2f}x",
        ]
        for cut in CUTS
    ]
    return Table(["skipped", DENSE, MASKED, OURS, "over dense"], rows)
