"""Rows that are multiples of each other, found by sorting projections."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["UNIT", "Multiples", "Rows", "multiples"]

#: Unit roundoff of float64.
UNIT = 2.0**-53

#: Two ratios of weights are the same up to this, relative: both weights of a scaled row were
#: rounded, and each of the two divisions rounds once. Two different ratios of float32 weights are
#: at least 2^-48 apart, so that for them, and for all narrower types, equality is decided exactly.
_RATIO = 4 * UNIT


class Multiples(IntEnum):
    """Which multiples of a unit are still multiples behind some operations."""

    EQUAL = 0
    POSITIVE = 1
    ANY = 2


@dataclass(frozen=True)
class Rows:
    """Affine rows to compare; ``slack`` bounds the rounding error of ``bias``.

    ``labels`` are numbers that must be equal for two units to be compared at all.
    """

    weight: Tensor  # (n, m) float64
    bias: Tensor  # (n,)
    slack: Tensor  # (n,)
    labels: Tensor  # (n, l)

    @property
    def full(self) -> Tensor:
        """(n, m + 1), weights and bias."""
        return torch.cat((self.weight, self.bias[:, None]), 1)


def multiples(rows: Rows, allowed: Multiples) -> list[tuple[int, int, float]]:
    """Finds rows that are multiples of others: (kept, gone, factor), gone = factor * kept.

    Of a set of multiples the largest row is kept, so that no factor exceeds 1 in magnitude. Rows
    are normalised and projected onto a random direction; only neighbours among the sorted
    projections are compared entry by entry.
    """
    pivot = _pivots(rows, allowed)
    normal = rows.full / pivot[:, None]
    slack = rows.slack / pivot.abs()
    found: list[tuple[int, int, float]] = []
    for cluster in _clusters(normal, slack, rows.labels):
        while len(cluster) > 1:
            kept = cluster[int(pivot[cluster].abs().argmax())]
            same = _alike(normal, slack, rows.labels, kept, cluster, allowed)
            gone = cluster[same & (cluster != kept)]
            factors = (pivot[gone] / pivot[kept]).tolist()
            found += [(int(kept), g, f) for g, f in zip(gone.tolist(), factors, strict=True)]
            cluster = cluster[~same & (cluster != kept)]
    return sorted(found, key=lambda merge: merge[1])


def _pivots(rows: Rows, allowed: Multiples) -> Tensor:
    """(n,) what a row is divided by: its first entry other than zero, or that one's magnitude."""
    full = rows.full
    if allowed is Multiples.EQUAL:
        return torch.ones_like(rows.bias)
    first = (full != 0).to(torch.uint8).argmax(1, keepdim=True)
    pivot = full.gather(1, first)[:, 0]
    pivot = torch.where(pivot == 0, 1.0, pivot)
    return pivot if allowed is Multiples.ANY else pivot.abs()


def _clusters(normal: Tensor, slack: Tensor, labels: Tensor) -> list[Tensor]:
    """Sets of rows whose projections do not differ by more than rounding, in order of the rows."""
    whole = torch.cat((normal, labels), 1)
    usable = torch.isfinite(whole).all(1).nonzero()[:, 0]  # dividing by a tiny pivot may overflow
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(whole.shape[1], generator=generator, dtype=torch.float64)
    whole = whole[usable]
    projected = whole @ direction
    steps = whole.shape[1] + 16  # of rounding: the products, their sum, and the ratios themselves
    error = steps * UNIT * (whole.abs() @ direction.abs())
    error += slack[usable] * direction[normal.shape[1] - 1].abs()
    order = projected.argsort()
    gap = projected[order].diff()
    near = gap <= error[order][1:] + error[order][:-1]
    number = torch.cat((torch.zeros(1, dtype=torch.int64), (~near).cumsum(0)))
    _, sizes = number.unique_consecutive(return_counts=True)
    parts = usable[order].split(sizes.tolist()) if len(usable) else ()
    return [part.sort().values for part in parts if len(part) > 1]


def _alike(
    normal: Tensor, slack: Tensor, labels: Tensor, kept: Tensor, others: Tensor, allowed: Multiples
) -> Tensor:
    """(len(others),) bool: which rows are multiples of one."""
    ratio = 0.0 if allowed is Multiples.EQUAL else _RATIO
    gap, bound = (normal[others] - normal[kept]).abs(), ratio * normal[kept].abs()
    weights = (gap[:, :-1] <= bound[:-1]).all(1)
    bias = gap[:, -1] <= bound[-1] + slack[others] + slack[kept]
    return weights & bias & (labels[others] == labels[kept]).all(1)
