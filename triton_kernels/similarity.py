"""Triton launchers of similarity: pairs, nearest rows and clusters of rows of norm 1.

The kernels propose, by products that may be off by a known bound. What the bound leaves open is
decided in float64 from the original rows, by torch, so that results are those of the compiled
kernels. Slots are handed out by an atomic and sorted afterwards; nothing depends on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._launch import AotCase, Config, cdiv, launch
from ._similarity_kernels import candidates_kernel, join_kernel, maxima_kernel

__all__ = [
    "AOT_CASES",
    "Rows",
    "similarity_clusters",
    "similarity_pairs",
    "similarity_topk",
]

_TILE = ("BLOCK_N", "BLOCK_M", "BLOCK_K")
#: By bytes per element of the rows.
_CONFIG = {
    2: Config(dict(zip(_TILE, (64, 64, 64), strict=True)), 4, 3),
    4: Config(dict(zip(_TILE, (64, 64, 32), strict=True)), 4, 2),
}
_JOIN = Config({"BLOCK_E": 256}, 4, 1)
_PARTS = (1, 2, 4)  # groups of columns in a tile
_ROOM = 1 << 20  # candidates that are looked at together, or more where there are more rows
_DECIDED = 1 << 22  # entries of the rows that are decided together in float64
_MAXIMA = 1 << 24  # best products of groups that exist together


@dataclass(frozen=True)
class Rows:
    """Rows x (N, K) against rows y (M, K); y is x for ``self_``.

    ``exact`` takes row and column numbers (E,) and gives their similarities in float64.
    """

    unit_x: Tensor  # (N, K) of norm 1, float32 or bfloat16
    unit_y: Tensor  # (M, K) likewise
    self_: bool
    absolute: bool
    recheck: bool
    exact: Callable[[Tensor, Tensor], Tensor]

    @property
    def bound(self) -> float:
        """How far a product may be from the exact one; 0 if products are trusted."""
        if not self.recheck:
            return 0.0
        # Rounded to bfloat16, each of two entries is off by up to 2^-8 of itself.
        rounding = 1.01 / 128 if self.unit_x.dtype == torch.bfloat16 else 0.0
        eps = torch.finfo(torch.float32).eps
        return rounding + max(1e-6, 4 * self.unit_x.shape[1] ** 0.5 * eps)

    def similarity(self, row: Tensor, col: Tensor) -> Tensor:
        """Of pairs (E,), in float64; exact where products are not trusted."""
        size = max(1, _DECIDED // max(1, self.unit_x.shape[1]))
        parts = zip(row.split(size), col.split(size), strict=True)
        values = [self.exact(r, c) if self.recheck else self._product(r, c) for r, c in parts]
        return torch.cat(values) if values else row.double()

    def _product(self, row: Tensor, col: Tensor) -> Tensor:
        return (self.unit_x[row].float() * self.unit_y[col].float()).sum(1).double()

    def key(self, value: Tensor) -> Tensor:
        return value.abs() if self.absolute else value


def _lowered(limits: Tensor, bound: float) -> Tensor:
    """The largest float32 numbers that are not above ``limits - bound``."""
    wide = limits.double() - bound
    near = wide.float()
    down = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() <= wide, near, down)


def _candidates(
    p: Rows, x: Tensor, limits: Tensor, *, upper: bool = False, include_self: bool = True
) -> Iterator[Tensor]:
    """Sorted keys row * M + column of the products that reach their row's limit, rows ascending.

    Rows count within x, which are some of the problem's or, for ``upper``, all: then only columns
    above the row are candidates. A part holds at most ``room`` keys; where there are more, the rows
    are split.
    """
    n, m = len(x), len(p.unit_y)
    room = max(_ROOM, 4 * n, m)
    config = _CONFIG[x.element_size()]
    flags = {"SELF": upper, "INCLUDE_SELF": include_self, "ABSOLUTE": p.absolute}
    ranges = [(0, n)] if n and m else []
    while ranges:
        first, last = ranges.pop()
        capacity = min(room, (last - first) * m)
        keys = torch.empty(capacity, dtype=torch.int64, device=x.device)
        found = torch.zeros(1, dtype=torch.int64, device=x.device)
        sizes = (last - first, m, x.shape[1], first, capacity)
        arguments = (x[first:last], p.unit_y, limits[first:last], keys, found, *sizes)
        launch(candidates_kernel, _grid(last - first, m, config), config, None, arguments, **flags)
        count = int(found)
        if count <= capacity:
            yield keys[:count].sort().values
            continue
        length = max(1, int((last - first) * capacity / count / 1.25))
        starts = range(first, last, length)
        ranges += [(at, min(last, at + length)) for at in reversed(starts)]


def _grid(n: int, m: int, config: Config) -> tuple[int]:
    return (cdiv(n, config.tile["BLOCK_N"]) * cdiv(m, config.tile["BLOCK_M"]),)


def similarity_pairs(
    p: Rows, threshold: float, *, include_self: bool, max_pairs: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Pairs whose similarity reaches the threshold, sorted by row and column.

    Args:
        p: the rows; x with itself gives pairs with row <= column only.
        threshold: for the similarity, or its magnitude.
        include_self: of x with itself, with row == column too.
        max_pairs: at most so many, the first ones; all if negative.

    Returns:
        row, col (E,) int64, value (E,) float32, and whether some were left out.
    """
    m, device = len(p.unit_y), p.unit_x.device
    threshold_of = torch.full((len(p.unit_x),), threshold, dtype=torch.float64, device=device)
    kept = [torch.empty(0, dtype=torch.int64, device=device)]
    values = [torch.empty(0, device=device)]
    count = 0
    limits = _lowered(threshold_of, p.bound)
    parts = _candidates(p, p.unit_x, limits, upper=p.self_, include_self=include_self)
    for keys in parts:
        value = p.similarity(keys // m, keys % m)
        reaches = p.key(value) >= threshold if p.recheck else slice(None)
        kept.append(keys[reaches])
        values.append(value[reaches].float())
        count += len(kept[-1])
        if 0 <= max_pairs < count:
            break
    part = slice(None, max_pairs if max_pairs >= 0 else None)
    keys = torch.cat(kept)[part]
    columns = max(1, m)
    return keys // columns, keys % columns, torch.cat(values)[part], 0 <= max_pairs < count


def similarity_topk(p: Rows, k: int, *, include_self: bool) -> tuple[Tensor, Tensor]:
    """The k best columns of every row, ties by smaller column, then -inf and -1.

    A first pass takes the best product of every group of columns. The k-th best of these is reached
    by k columns, so a second pass looks only at what reaches it too, to within the bound.

    Args:
        p: the rows.
        k: at least 1.
        include_self: of x with itself, whether a row is its own candidate.

    Returns:
        values (N, k) float32 and columns (N, k) int64.
    """
    n, m, x = len(p.unit_x), len(p.unit_y), p.unit_x
    columns = torch.full((n, k), -1, dtype=torch.int64, device=x.device)
    values = torch.full((n, k), -torch.inf, device=x.device)
    without_self = p.self_ and not include_self
    rows = max(1, _MAXIMA // max(1, m))
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        limits = _lowered(_reached(p, x[part], k, first, without_self), 2 * p.bound)
        for keys in _candidates(p, x[part], limits):
            row, col = first + keys // m, keys % m
            if without_self:
                row, col = row[row != col], col[row != col]
            _rank(p, row, col, values, columns)
    return values, columns


def _reached(p: Rows, x: Tensor, k: int, offset: int, without_self: bool) -> Tensor:
    """(N,) what the products of at least k columns reach; -inf where there are few columns."""
    n, m = len(x), len(p.unit_y)
    config = _CONFIG[x.element_size()]
    sizes = {parts: config.tile["BLOCK_M"] // parts for parts in _PARTS}
    # The more groups there are beside k, the less often two of the k best share one.
    parts = next((parts for parts, size in sizes.items() if m >= 4 * k * size), _PARTS[-1])
    groups = cdiv(m, sizes[parts])
    if groups <= k:
        return torch.full((n,), -torch.inf, device=x.device)
    maxima = torch.empty(n, groups, device=x.device)
    flags = {"WITHOUT_SELF": without_self, "ABSOLUTE": p.absolute, "PARTS": parts}
    arguments = (x, p.unit_y, maxima, n, m, x.shape[1], offset, groups)
    launch(maxima_kernel, _grid(n, m, config), config, None, arguments, **flags)
    return maxima.topk(k).values[:, -1]


def _rank(p: Rows, row: Tensor, col: Tensor, values: Tensor, columns: Tensor) -> None:
    """Writes the best of some candidates, sorted by row and column, to the places of their rows."""
    value = p.similarity(row, col)
    order = p.key(value).sort(dim=0, descending=True, stable=True).indices
    order = order[row[order].sort(dim=0, stable=True).indices]  # by row, best first
    row, col, value = row[order], col[order], value[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    among = place < values.shape[1]
    columns[row[among], place[among]] = col[among]
    values[row[among], place[among]] = value[among].float()


def similarity_clusters(p: Rows, threshold: float) -> Tensor:
    """Connected components of the pairs that reach the threshold, numbered by first member.

    Args:
        p: rows with themselves.
        threshold: for the similarity, or its magnitude.

    Returns:
        labels (N,) int64. Edges are joined part by part and not kept.
    """
    n, device = len(p.unit_x), p.unit_x.device
    parent = torch.arange(n, dtype=torch.int32, device=device)
    limits = torch.full((n,), threshold, dtype=torch.float64, device=device)
    limits = _lowered(limits, p.bound)
    for keys in _candidates(p, p.unit_x, limits, upper=True, include_self=False):
        row, col = keys // n, keys % n
        apart = parent[row] != parent[col]  # all are roots or point to one
        row, col = row[apart], col[apart]
        linked = p.key(p.similarity(row, col)) >= threshold
        ends = row[linked].int(), col[linked].int()
        count = len(ends[0])
        if count:
            grid = (cdiv(count, _JOIN.tile["BLOCK_E"]),)
            launch(join_kernel, grid, _JOIN, None, (parent, *ends, count))
            parent = _flattened(parent)
    is_root = parent == torch.arange(n, device=device)
    labels: Tensor = (is_root.cumsum(0) - 1)[parent.long()]
    return labels


def _flattened(parent: Tensor) -> Tensor:
    """Every member points to its root."""
    while True:
        above = parent[parent.long()]
        if torch.equal(above, parent):
            return parent
        parent = above


def _aot(kernel: Any, config: Config, types: dict[str, str], **constants: Any) -> AotCase:
    constexprs: dict[str, Any] = {**constants, **config.tile}
    signature = {
        name: "constexpr" if name in constexprs else types.get(name, "i32")
        for name in kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return kernel, signature, constexprs, {**options, "enable_fp_fusion": False}


def _aot_tiles(kernel: Any, size: int, **constants: Any) -> AotCase:
    rows = {2: "*bf16", 4: "*fp32"}[size]
    types = {"x": rows, "y": rows, "limits": "*fp32", "maxima": "*fp32"}
    types |= {"keys": "*i64", "found": "*i64"}
    return _aot(kernel, _CONFIG[size], types, **constants)


#: What to compile ahead of time: (kernel, signature, constexprs, options).
AOT_CASES: list[AotCase] = [
    _aot_tiles(candidates_kernel, 4, SELF=True, INCLUDE_SELF=False, ABSOLUTE=False),
    _aot_tiles(candidates_kernel, 4, SELF=False, INCLUDE_SELF=True, ABSOLUTE=True),
    _aot_tiles(candidates_kernel, 2, SELF=True, INCLUDE_SELF=True, ABSOLUTE=False),
    _aot_tiles(maxima_kernel, 4, WITHOUT_SELF=True, ABSOLUTE=False, PARTS=1),
    _aot_tiles(maxima_kernel, 4, WITHOUT_SELF=False, ABSOLUTE=True, PARTS=4),
    _aot_tiles(maxima_kernel, 2, WITHOUT_SELF=True, ABSOLUTE=True, PARTS=2),
    _aot(join_kernel, _JOIN, {"parent": "*i32", "rows": "*i32", "columns": "*i32"}),
]
