"""Measures the costs behind a dispatch table by timing the ops themselves."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood._measure import Call, Sampler
from sapwood.ops._cost_model import LARGEST_BATCH, DispatchTable, Key, Surface, batch_units

#: Measured weights are side x side: inside L2, at its edge, and well beyond it.
SIDES = (256, 1024, 2048)

#: Measured batches; beyond the last one the cost per column no longer changes.
BATCHES = (1, 4, 8, 16, 64, 256)

#: Measured densities, spread over the range in which the format can win.
DENSITIES = {
    "dense": (1.0,),
    "bitmap": (0.1, 0.5, 0.9),
    "csr": (0.01, 0.1, 0.5, 0.9),
    "sell": (0.01, 0.05, 0.1, 0.4, 0.9),
}

_OVERHEAD_SIDE = 16  # its product takes nanoseconds: what is left is the cost of a call
_FEWEST_ROUNDS = 2
_SETTLE = 1.5e-3  # seconds, for a weight of the largest side
_PATIENCE = 3  # times the given seconds: how long to wait for a quiet moment

#: Above this noise the figures say more about other programs than about the kernels.
TOO_NOISY = 0.15


class Cell(NamedTuple):
    """One point of the grid."""

    format: str
    side: int
    batch: int
    density: float


def measure(key: Key, dtype: torch.dtype, *, seconds: float) -> tuple[DispatchTable, float]:
    """Times every cell of the grid in rounds and keeps the smallest times.

    Args:
        key: what is measured; its device must be the current one, its threads already set.
        dtype: of values and activations.
        seconds: duration; beyond it only the first two rounds are completed, and up to twice as
            much is spent on waiting for a quiet moment.

    Returns:
        The table, and its noise: by how much the second smallest time exceeds the smallest, as
        the median over all cells. A time that was met twice is that of the kernel.
    """
    start = time.perf_counter()
    formats = [name for name in DENSITIES if _has_kernel(name, key)]
    with torch.no_grad(), torch.autocast(key.device, enabled=False):
        samplers = {
            cell: Sampler(call, key.device, settle=_settle(cell))
            for cell, call in _cells(key.device, dtype, formats)
        }
        best = {cell: [sampler.first] for cell, sampler in samplers.items()}
        noise, rounds, spent = 1.0, 1, 0.0
        while rounds < _FEWEST_ROUNDS or spent < seconds * (1 if noise < TOO_NOISY else _PATIENCE):
            for cell, sampler in samplers.items():
                best[cell] = heapq.nsmallest(2, (*best[cell], sampler.sample()))
            rounds += 1
            noise = statistics.median(second / first - 1 for first, second in best.values())
            spent = time.perf_counter() - start
    fastest = {cell: times[0] for cell, times in best.items()}
    table = DispatchTable(
        key=key,
        sides=SIDES,
        surfaces={name: _surface(name, key.device, fastest) for name in formats},
        version=sapwood.__version__,
        source="calibrated",
    )
    return table, noise


def _has_kernel(name: str, key: Key) -> bool:
    return name in LARGEST_BATCH[key.device] and (name != "sell" or key.dtype == "float32")


def _cells(device: str, dtype: torch.dtype, formats: list[str]) -> Iterator[tuple[Cell, Call]]:
    """Every cell with the call that it times.

    A weight is used with descending batches: when the smallest ones read it, whose time is that of
    reading it, it has settled in the cache that it fits.
    """
    for side in (_OVERHEAD_SIDE, *SIDES):
        generator = torch.Generator().manual_seed(side)
        weight = torch.randn(side, side, generator=generator).to(device, dtype)
        uniform = torch.rand(side, side, generator=generator).to(device)
        inputs = torch.randn(BATCHES[-1], side, generator=generator).to(device, dtype)
        for name in formats:
            for density in _densities(name, side):
                product = _product(name, weight, uniform < density)
                for batch in reversed(_batches(side)):
                    if batch <= LARGEST_BATCH[device][name]:
                        yield Cell(name, side, batch, density), _bind(product, inputs[:batch])


def _settle(cell: Cell) -> float:
    """Large batches hardly notice where the weight lay before; it settles while they run."""
    return _SETTLE * (cell.side / SIDES[-1]) ** 2 if cell.batch <= 16 else 0.0


def _densities(name: str, side: int) -> tuple[float, ...]:
    return (1.0,) if side == _OVERHEAD_SIDE else DENSITIES[name]


def _batches(side: int) -> tuple[int, ...]:
    return (1,) if side == _OVERHEAD_SIDE else BATCHES


def _bind(product: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return lambda: product(x)


def _product(name: str, weight: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x (W o M)^T in the given format, by the same op that a packed weight runs."""
    ops = torch.ops.sapwood
    n, k = weight.shape
    if name == "dense":
        product = torch.where(mask, weight, 0.0)
        return lambda x: F.linear(x, product)
    if name == "csr":
        csr = ops.pack_csr(weight, mask)
        return lambda x: ops.packed_linear_csr(x, *csr, None, k, "none", None, None, None, None)
    if name == "bitmap":
        bitmap = ops.pack_bitmap(weight, mask)
        return lambda x: ops.packed_linear_bitmap(x, *bitmap, None, k, "none")
    sell = ops.pack_sell(weight, mask)
    return lambda x: ops.packed_linear_sell(x, *sell, None, n, k, "none")


def _surface(name: str, device: str, best: dict[Cell, float]) -> Surface:
    overhead = best[Cell(name, _OVERHEAD_SIDE, 1, 1.0)]
    batches = tuple(b for b in BATCHES if b <= LARGEST_BATCH[device][name])

    def cost(side: int, batch: int, density: float) -> float:
        spent = best[Cell(name, side, batch, density)] - overhead
        return max(0.0, spent) / (side * side * batch_units(name, batch))

    return Surface(
        overhead=overhead,
        batches=batches,
        densities=DENSITIES[name],
        costs=tuple(
            tuple(tuple(cost(side, batch, d) for d in DENSITIES[name]) for batch in batches)
            for side in SIDES
        ),
    )
