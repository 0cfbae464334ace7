"""Chapter 2: nearest digits, and copies among many rows, without a matrix of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood import data
from sapwood._measure import interleave
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.report.page import Chapter, Section, Stat, Table

TITLE = "Nearest rows"
THRESHOLD, WIDTH = 0.9, 128
OURS, FULL = "similarity_pairs", "full matrix"


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    source: str
    digits: int
    right: float  # share of the test digits whose nearest training digit is the same figure
    rows: int
    planted: int
    pairs: int
    missing: int  # planted copies that were not found
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        return self.seconds[FULL] / self.seconds[OURS]

    @property
    def megabytes(self) -> float:
        """What the matrix of all similarities takes in float32."""
        return self.rows**2 * 4 / 1e6


def run(context: Context) -> ChapterResult:
    """Classifies digits by their nearest neighbour, then finds copies; some seconds."""
    m = _measure(context)
    found = f"{m.pairs} pairs among {m.rows} rows"
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_section(m)]),
        headline=f"Found {found} {m.speedup:.1f}x as fast as by the matrix of all similarities.",
        stats=[
            Stat(f"{100 * m.right:.1f} %", "of the test digits are nearest to one of their kind"),
            Stat(f"{m.speedup:.1f}x", "as fast as the full matrix, finding the same pairs"),
        ],
        summary=_table(m),
        remarks=[f"All {m.planted} planted copies were found."]
        if not m.missing
        else [f"{m.missing} of {m.planted} planted copies were NOT found."],
        facts=[("Similar rows", f"cosine of at least {THRESHOLD}, {m.rows} rows of {WIDTH}")],
        data=_data(m),
    )


def _measure(context: Context) -> Measured:
    digits = data.load_digits()
    _, nearest = sapwood.ops.similarity_topk(
        digits.test_inputs.flatten(1), 1, digits.train_inputs.flatten(1)
    )
    right = digits.train_labels[nearest[:, 0]] == digits.test_labels
    rows = 3000 if context.quick else 8000
    planted = rows // 10
    x = _rows_with_copies(rows, planted, context.seed)
    pairs = sapwood.ops.similarity_pairs(x, threshold=THRESHOLD)
    found = set(zip(pairs.row.tolist(), pairs.col.tolist(), strict=True))
    copies = {(i, rows - planted + i) for i in range(planted)}
    times = interleave(
        {
            OURS: lambda: sapwood.ops.similarity_pairs(x, threshold=THRESHOLD),
            FULL: lambda: _by_full_matrix(x),
        },
        rounds=3 if context.quick else 7,
        seconds=0.0,
    )
    return Measured(
        source=digits.source,
        digits=len(digits.test_labels),
        right=float(right.double().mean()),
        rows=rows,
        planted=planted,
        pairs=len(pairs),
        missing=len(copies - found),
        seconds={name: min(samples) for name, samples in times.items()},
    )


def _rows_with_copies(n: int, planted: int, seed: int) -> Tensor:
    """Random rows, the last ones slightly changed copies of the first, at a cosine of 0.98."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator)
    x[n - planted :] = x[:planted] + 0.2 * torch.randn(planted, WIDTH, generator=generator)
    return x


def _by_full_matrix(x: Tensor) -> Tensor:
    unit = F.normalize(x)
    return (unit @ unit.T >= THRESHOLD).triu_(1).nonzero()


def _lead(m: Measured) -> str:
    return (
        f"Comparing {m.rows} rows with each other gives {m.rows**2 / 1e6:.0f} million numbers, of "
        f"which {m.pairs} matter. The ops of the similarity family look at all of them and keep "
        "only these."
    )


def _section(m: Measured) -> Section:
    return Section(
        "Pairs and neighbours",
        [
            f"Each of the {m.digits} test digits takes the label of the training digit with the "
            f"most similar pixels: {100 * m.right:.1f} % are right, without any training.",
            f"Then {m.planted} of {m.rows} random rows are slightly changed copies of others. Both "
            "ways find the same pairs; one of them writes the whole matrix first.",
        ],
        [_table(m)],
    )


def _table(m: Measured) -> Table:
    return Table(
        ["way", "time", "matrix in memory"],
        [
            [FULL, f"{1e3 * m.seconds[FULL]:.0f} ms", f"{m.megabytes:.0f} MB"],
            [OURS, f"{1e3 * m.seconds[OURS]:.0f} ms", "none"],
        ],
    )


def _data(m: Measured) -> dict[str, Any]:
    return {
        "digits_right": m.right,
        "rows": m.rows,
        "pairs": m.pairs,
        "missing": m.missing,
        "seconds": m.seconds,
        "speedup": m.speedup,
    }
