"""Selection with structure: n of every m inputs, whole output rows, minima of output rows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sapwood.pruning import _radix, _shards
from sapwood.pruning._pool import Pool

__all__ = ["misfits"]


def misfits(shapes: Mapping[str, Sequence[int]], m: int) -> list[str]:
    """The tensors that n:m sparsity cannot divide into runs of ``m`` inputs.

    The inputs of a weight are its second dimension: input features, or input channels per group.

    Example:
        >>> from sapwood.pruning.structured import misfits
        >>> misfits({"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "bias": (32,)}, 4)
        ['conv1', 'bias']

    Args:
        shapes: name -> weight shape, (out, in) or (out, in / groups, *kernel).
        m: length of a run.

    Returns:
        The names, in order.
    """
    return [name for name, shape in shapes.items() if len(shape) < 2 or shape[1] % m]


def n_of_m(pool: Pool, n: int, m: int, skip: Sequence[str], where: str) -> list[Tensor]:
    """Keep masks (numel,) with the ``n`` best of every run of ``m`` inputs; skipped ones as are.

    A kernel position has runs of its own: they follow the input channels. A run where fewer than
    ``n`` are active keeps those.
    """
    for layer, part in zip(pool.layers, pool.parts, strict=True):
        if part.dim == 1 and layer.name not in skip:
            raise NotImplementedError(
                f"{where}: granularity 'n:m' needs shards along another dimension than the inputs, "
                f"such as Shard(0), the default of fully_shard, got Shard(1) for {layer.name}"
            )
    keys = _radix.Keys(pool.layers, pool.order)
    return [
        pool.present(i) if layer.name in skip else _n_of_m(keys, layer, n, m)
        for i, layer in enumerate(pool.layers)
    ]


def _n_of_m(keys: _radix.Keys, layer: _radix.Layer, n: int, m: int) -> Tensor:
    shape = layer.scores.shape
    mask = torch.ones(shape, dtype=torch.bool, device=layer.scores.device)
    scores, keep = layer.scores.movedim(1, -1), mask.movedim(1, -1)  # (out, *kernel, in)
    active = None if layer.active is None else layer.active.view(shape).movedim(1, -1)
    for rows in _row_groups(scores):
        present = None if active is None else active[rows].reshape(-1)
        runs = keys.convert(scores[rows].reshape(-1), present, None).view(-1, m)
        worst = runs.argsort(dim=1, stable=True)[:, : m - n]
        kept = torch.ones_like(runs, dtype=torch.bool).scatter_(1, worst, False)
        if present is not None:
            kept &= present.view(-1, m)
        keep[rows] = kept.view(keep[rows].shape)
    return mask.view(-1)


def warn_of_skipped(names: Sequence[str], m: int, where: str) -> None:
    """Says which tensors n:m sparsity leaves as they are."""
    if names:
        warnings.warn(
            f"{where}: the inputs of {', '.join(names)} do not divide by {m}, "
            f"on_misfit='skip' leaves these tensors as they are",
            stacklevel=4,  # the caller of select
        )


def protect_units(pool: Pool, min_keep: int, where: str) -> Pool:
    """The pool in which every output row keeps its best ``min_keep`` active elements."""
    _require_whole_rows(pool, "min_keep_per_unit", where)
    keys = _radix.Keys(pool.layers, pool.order)
    return pool.protecting([_best_of_rows(keys, layer, min_keep) for layer in pool.layers])


def _best_of_rows(keys: _radix.Keys, layer: _radix.Layer, count: int) -> Tensor:
    """Flags (numel,) of the last ``count`` active elements of each row in the order."""
    scores = layer.scores if layer.scores.dim() else layer.scores.view(1)
    best = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    for rows in _row_groups(scores):
        values = scores[rows]
        width = values[0].numel()
        part = slice(rows.start * width, rows.start * width + values.numel())
        active = None if layer.active is None else layer.active[part]
        ranked = keys.convert(values.reshape(-1), active, None).view(-1, width)
        last = ranked.topk(min(count, width), dim=1).values[:, -1:]
        above, ties = ranked > last, ranked == last
        from_the_end = ties.flip(1).cumsum(1).flip(1)
        places = min(count, width) - above.sum(1, keepdim=True)
        flags = (above | (ties & (from_the_end <= places))).view(-1)
        best[part] = flags if active is None else flags & active
    return best


class Rows:
    """Whole output rows to choose from, by the L2 norm of their active scores.

    The order of the rows is (norm, tensor, index). The squares are added up in one fixed tree, so
    that equal rows have equal norms on every device and however the rows are sharded.
    """

    def __init__(self, pool: Pool, min_keep: int, where: str) -> None:
        _require_whole_rows(pool, "granularity 'row'", where)
        self._pool = pool
        lengths = [_rows_of(part.shape) for part in pool.parts]
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self._slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        device = pool.layers[0].scores.device if pool.layers else torch.device("cpu")
        norms = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        costs = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        for layer, part, whole in zip(pool.layers, pool.parts, self._slices, strict=True):
            if layer.counted:
                here = self._here(part, whole, layer)
                norms[here], costs[here] = _squares_and_costs(layer)
        #: of every row of every tensor: its squared norm, and what it would take to switch it off
        self._norms: Tensor = pool.ranks.total(norms).cpu()
        self._costs: Tensor = pool.ranks.total(costs).cpu()
        self._free = self._costs > 0
        for whole, size, gone in zip(self._slices, pool.sizes, pool.inactive, strict=True):
            self._free[whole] &= ~self._kept(whole, min(min_keep, size - gone))
        self.bounds = [
            gone + int(self._costs[whole][self._free[whole]].sum())
            for whole, gone in zip(self._slices, pool.inactive, strict=True)
        ]

    def together(self, off: int) -> list[Tensor]:
        """Keep masks (numel,) with about ``off`` elements off in all tensors together."""
        gone = torch.zeros_like(self._free)
        self._take(gone, slice(0, gone.numel()), off - sum(self._pool.inactive))
        return self._masks(gone)

    def apart(self, counts: Sequence[int]) -> list[Tensor]:
        """Keep masks (numel,) with about ``counts`` elements off per tensor.

        What the rounding to whole rows leaves over is carried to the next tensor.
        """
        gone = torch.zeros_like(self._free)
        carried = 0
        for whole, count, inactive in zip(self._slices, counts, self._pool.inactive, strict=True):
            if count > inactive:
                carried += count - inactive
                carried -= self._take(gone, whole, carried)
        return self._masks(gone)

    def _take(self, gone: Tensor, among: slice, target: int) -> int:
        """Marks the first rows whose costs come nearest to ``target``; returns those costs."""
        candidates = self._free[among].nonzero().view(-1)
        order = candidates[self._norms[among][candidates].argsort(stable=True)]
        totals = torch.cat((torch.zeros(1, dtype=torch.int64), self._costs[among][order].cumsum(0)))
        reached = min(int(torch.searchsorted(totals, target)), order.numel())
        if reached and target - int(totals[reached - 1]) <= int(totals[reached]) - target:
            reached -= 1
        gone[among][order[:reached]] = True
        return int(totals[reached])

    def _kept(self, whole: slice, min_keep: int) -> Tensor:
        """Flags of the best rows that together have ``min_keep`` active elements."""
        from_the_best = self._norms[whole].argsort(stable=True).flip(0)
        costs = self._costs[whole][from_the_best]
        better = costs.cumsum(0) - costs
        return torch.zeros_like(self._free[whole]).scatter_(0, from_the_best, better < min_keep)

    def _masks(self, gone: Tensor) -> list[Tensor]:
        masks = []
        for i, (layer, part) in enumerate(zip(self._pool.layers, self._pool.parts, strict=True)):
            here = self._here(part, self._slices[i], layer)
            present = self._pool.present(i)
            rows = gone[here].to(present.device)
            if rows.numel():
                present.view(rows.numel(), -1).masked_fill_(rows[:, None], False)
            masks.append(present)
        return masks

    @staticmethod
    def _here(part: _shards.Part, whole: slice, layer: _radix.Layer) -> slice:
        """Where the rows of this rank's part stand among all rows."""
        start = whole.start + part.start
        return slice(start, start + _rows_of(layer.scores.shape))


def _squares_and_costs(layer: _radix.Layer) -> tuple[Tensor, Tensor]:
    """(rows,) sum of the squared active scores in float64, and number of active elements."""
    scores = layer.scores if layer.scores.dim() else layer.scores.view(1)
    squares = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    costs = torch.full_like(squares, scores[:1].numel(), dtype=torch.int64)
    active = None if layer.active is None else layer.active.view(len(scores), -1)
    if active is not None:
        costs = active.sum(1)
    for rows in _row_groups(scores):
        values = scores[rows].reshape(rows.stop - rows.start, -1).double()
        values = values * values
        if active is not None:
            values.masked_fill_(~active[rows], 0.0)
        width = values.shape[1]
        while width > 1:
            half = (width + 1) // 2
            values[:, : width - half] += values[:, half:width]
            width = half
        squares[rows] = values[:, 0]
    return squares, costs


def _row_groups(tensor: Tensor) -> Iterator[slice]:
    """Slices along the first dimension of about a chunk each; none if the tensor is empty."""
    if not tensor.numel():
        return
    step = max(1, _radix.chunk_size(tensor.device) // tensor[0].numel())
    for start in range(0, len(tensor), step):
        yield slice(start, min(start + step, len(tensor)))


def _rows_of(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _require_whole_rows(pool: Pool, option: str, where: str) -> None:
    for layer, part in zip(pool.layers, pool.parts, strict=True):
        if part.dim not in (None, 0):
            raise NotImplementedError(
                f"{where}: {option} needs whole rows on every rank, as Shard(0), the default of "
                f"fully_shard, gives them, got Shard({part.dim}) for {layer.name}"
            )
