"""Small dispatch tables with costs that are easy to check by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sapwood.ops._cost_model import DispatchTable, Key, Surface

KEY = Key("cpu", "avx512", "float32", 1)
SIDES = (256, 1024)


def surface(cost: float, overhead: float = 1e-6, *, slope: float = 0.0) -> Surface:
    """Costs per weight and batch column: ``cost + slope * density``, whatever shape and batch."""
    densities = (0.1, 1.0)
    row = tuple(cost + slope * d for d in densities)
    return Surface(overhead, (1, 64), densities, ((row, row),) * len(SIDES))


def table(**changes: Any) -> DispatchTable:
    """Dense costs 1 ps per weight and column; csr 2 ps per kept weight; bitmap 0.5 ps + 0.5 ps."""
    surfaces = {
        "dense": surface(1e-12),
        "csr": surface(0.0, slope=2e-12),
        "bitmap": surface(0.5e-12, slope=0.5e-12),
    }
    return replace(DispatchTable(KEY, SIDES, surfaces, "0.1.0", "calibrated"), **changes)
