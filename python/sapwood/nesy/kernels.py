"""What one elimination step does to numbers: index tables, and the op that sums.

A step multiplies some weights, applies the maps, keeps the entries that agree with the evidence and
sums out variables. Its entries are listed once, when the plan is made: per value of the evidence
and per result the places in each weight that belong to it. Rows look up their list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sapwood.nesy.supports import Indices
from sapwood.ops.logsemiring import log_conv, log_einsum, log_scan

#: Sums over the last dimension.
Reduce = Callable[[Tensor], Tensor]

#: From this many entries on a product without evidence is an einsum.
_EINSUM_FROM = 1024


@dataclass(frozen=True)
class Operand:
    """A weight in a step: its variables, and how the parent's values lie in it."""

    scope: tuple[int, ...]
    size: int  # entries, all variables together
    rows: tuple[int, ...] | None = None
    fixed: bool = False

    def places(self, values: dict[int, Indices], sizes: Sequence[int], count: int) -> Indices:
        """Where each entry of the joint lies in the flat weight."""
        flat = np.zeros(count, dtype=np.int64)
        if self.fixed and self.rows is not None:
            flat += self.rows[0]
        for number, variable in enumerate(self.scope):
            places = values[variable]
            if number == 0 and self.rows is not None and not self.fixed:
                places = np.asarray(self.rows)[places]
            flat = flat * sizes[variable] + places
        return flat


@dataclass(frozen=True)
class Shape:
    """The structure of a step; equal shapes have equal tables."""

    sizes: tuple[int, ...]
    operands: tuple[Operand, ...]
    maps: tuple[tuple[int, tuple[int, ...], int], ...]  # output, arguments, identity of the table
    known: tuple[tuple[int, int | None], ...]  # variable, its place or None for a column
    kept: tuple[int, ...]
    base: tuple[int, ...]

    @property
    def joint(self) -> int:
        """Combinations of the variables that are summed over and kept; known ones not counted."""
        known = {v for v, _ in self.known}
        return math.prod(self.sizes[v] for v in self.base if v not in known)


@dataclass
class Kernel:
    """A step made ready to run.

    ``table`` (E, operands, kept_size * width) holds, per row of evidence, the place of each term in
    each operand; -1 in the empty places of a list.
    """

    shape: Shape
    kind: str  # listed, einsum, convolution
    evidence: tuple[int, ...]  # per column two more than its values: unknown ones at both ends
    kept_size: int
    width: int  # padded length of the lists
    table: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    equation: str = ""

    @property
    def entries(self) -> int:
        """Terms per row."""
        return self.kept_size * self.width


def make(shape: Shape, tables: Sequence[Indices]) -> Kernel:
    """Lists the entries of a step and chooses the op."""
    dims = [shape.sizes[v] for v in shape.base]
    count = math.prod(dims)
    grid = np.indices(dims).reshape(len(dims), count)
    values: dict[int, Indices] = dict(zip(shape.base, grid, strict=True))
    for (output, arguments, _), table in zip(shape.maps, tables, strict=True):
        values[output] = table[tuple(values[a] for a in arguments)]
    keep = np.ones(count, dtype=bool)
    for variable, place in shape.known:
        if place is not None:
            keep &= values[variable] == place
    columns = [v for v, place in shape.known if place is None]
    evidence = tuple(shape.sizes[v] + 2 for v in columns)  # unknown, its values, unknown
    kept_dims = [shape.sizes[v] for v in shape.kept]
    kept_size = math.prod(kept_dims)
    group = _ravel([values[v] + 1 for v in columns], evidence, count) * kept_size
    group += _ravel([values[v] for v in shape.kept], kept_dims, count)
    places = [operand.places(values, shape.sizes, count)[keep] for operand in shape.operands]
    kernel = Kernel(shape, "listed", evidence, kept_size, 0)
    _list(kernel, group[keep], places)
    _choose(kernel, group[keep], places)
    return kernel


def _ravel(values: Sequence[Indices], dims: Sequence[int], count: int) -> Indices:
    flat = np.zeros(count, dtype=np.int64)
    for value, size in zip(values, dims, strict=True):
        flat = flat * size + value
    return flat


def _list(kernel: Kernel, group: Indices, places: Sequence[Indices]) -> None:
    """Sorts the entries by group and pads each group's list to the longest."""
    groups = math.prod(kernel.evidence) * kernel.kept_size
    lengths = np.bincount(group, minlength=groups)
    kernel.width = max(int(lengths.max(initial=0)), 1)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(lengths) - lengths
    within = np.arange(len(group)) - starts[group[order]]
    table = np.full((groups, len(places), kernel.width), -1, dtype=np.int64)
    for number, place in enumerate(places):
        table[group[order], number, within] = place[order]
    by_evidence = table.reshape(math.prod(kernel.evidence), kernel.kept_size, len(places), -1)
    flat = by_evidence.transpose(0, 2, 1, 3).reshape(len(by_evidence), len(places), -1)
    kernel.table = np.ascontiguousarray(flat)


def _choose(kernel: Kernel, group: Indices, places: Sequence[Indices]) -> None:
    shape = kernel.shape
    if kernel.evidence:
        return
    plain = not shape.known and all(o.rows is None for o in shape.operands)
    if plain and not shape.maps and len(shape.operands) > 1 and len(group) >= _EINSUM_FROM:
        letters = [chr(ord("a") + v) for v in range(min(26, len(shape.sizes)))]
        if len(shape.sizes) <= len(letters):
            terms = ["..." + "".join(letters[v] for v in o.scope) for o in shape.operands]
            kept = "".join(letters[v] for v in shape.kept)
            kernel.kind, kernel.equation = "einsum", f"{','.join(terms)}->...{kept}"
            return
    if plain and _is_convolution(kernel, group, places):
        kernel.kind = "convolution"


def _is_convolution(kernel: Kernel, group: Indices, places: Sequence[Indices]) -> bool:
    """Whether the step is the distribution of v + w, both of consecutive integers."""
    shape = kernel.shape
    if len(shape.maps) != 1 or len(shape.operands) != 2 or len(shape.base) != 2:
        return False
    first, second = shape.operands
    if len(first.scope) != 1 or len(second.scope) != 1 or len(shape.kept) != 1:
        return False
    if first.size + second.size - 1 != kernel.kept_size or min(first.size, second.size) < 2:
        return False
    output, arguments, _ = shape.maps[0]
    if shape.kept != (output,) or set(arguments) != set(shape.base):
        return False
    return len(group) == first.size * second.size and bool((group == places[0] + places[1]).all())


def run(kernel: Kernel, operands: Sequence[Tensor]) -> Tensor:
    """Carries out a step that has an op of its own.

    Args:
        kernel: the step.
        operands: each (B, G, size), flat over its variables.

    Returns:
        (B, G, kept_size).
    """
    shape = kernel.shape
    plain = [
        x.reshape(*x.shape[:-1], *(shape.sizes[v] for v in o.scope))
        for x, o in zip(operands, shape.operands, strict=True)
    ]
    if kernel.kind == "convolution":
        return log_conv(*plain)
    result = log_einsum(kernel.equation, *plain)
    return result.reshape(*result.shape[: result.dim() - len(shape.kept)], -1)


def log_chain(vector: Tensor, matrices: Tensor) -> Tensor:
    """A chain: vector (B, 1, k) times matrices (B, n, k * k), which gives (B, 1, k)."""
    k = vector.shape[-1]
    return log_scan(matrices.unflatten(-1, (k, k)), vector[:, 0]).unsqueeze(1)


def scan(vector: Tensor, matrices: Tensor, reduce: Reduce) -> Tensor:
    """The same with any sum, (B or 1, ...) each."""
    k = vector.shape[-1]
    state = vector[:, 0]
    for step in matrices.unflatten(-1, (k, k)).unbind(1):
        state = reduce((state[..., None] + step).transpose(-1, -2))
    return state.unsqueeze(1)
