"""Gauss-Hermite nodes: a normal distribution as a finite one."""

from __future__ import annotations

import math

import numpy as np

from sapwood.nesy.draws import ContinuousLeaf
from sapwood.nesy.errors import UnsupportedMonadError


def normal(
    leaf: ContinuousLeaf, mean: float, deviation: float, nodes: int
) -> tuple[list[float], list[float]]:
    """Values and probabilities that integrate polynomials below degree ``2 * nodes`` exactly.

    Raises:
        UnsupportedMonadError: for another distribution than a normal one.
    """
    if leaf.distribution is not None:
        kind = type(leaf.distribution).__name__
        raise UnsupportedMonadError(
            f"sapwood.nesy: GiryQuadrature must integrate normal draws, got {kind}"
        )
    points, weights = np.polynomial.hermite.hermgauss(nodes)
    values = mean + math.sqrt(2.0) * deviation * points
    return values.tolist(), (weights / math.sqrt(math.pi)).tolist()
