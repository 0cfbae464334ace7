"""The strict joint: all combinations of all draws at once. For comparisons only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import listed
from sapwood.nesy.draws import Leaf
from sapwood.nesy.execute import log_sum
from sapwood.nesy.factors import Graph
from sapwood.nesy.plan import Query, graph_of
from sapwood.nesy.supports import Places
from sapwood.nesy.trace import Keys, Trace

_MOST_ENTRIES = 10**8


def log_mass(traced: Trace, query: Query, dtype: torch.dtype | None) -> Tensor:
    """The same mass as a plan's, by one sum over the joint of every path.

    Raises:
        ValueError: for a joint of more than 1e8 entries.
    """
    parts = []
    for path in traced.paths:
        keys = Keys()
        keys.path(path)
        graph = graph_of(path, keys, query, everything=True)
        if graph.possible:
            parts.append(_path_mass(graph, keys, traced.batch, dtype))
    if not parts:
        parts = [torch.full((1,), -math.inf, dtype=dtype)]
    rows = listed.common_rows(parts)
    total = log_sum(torch.stack([p.expand(rows) for p in parts], -1))
    return total[0] if traced.batch is None else total.expand(traced.batch)


def _path_mass(graph: Graph, keys: Keys, batch: int | None, dtype: torch.dtype | None) -> Tensor:
    outputs = {m.output for m in graph.maps}
    data = {v for v, known in graph.known.items() if known.column is not None} - outputs
    drawn = {weight.scope[-1] for weight in graph.weights}
    base = [v for v in range(len(graph.supports)) if v in drawn]
    sizes = [len(graph.supports[v]) for v in base]
    rows = 1 if batch is None else batch
    if math.prod(sizes) * rows > _MOST_ENTRIES:
        shown = f"{rows} x {math.prod(sizes)}"
        _check.fail(ValueError, "nesy.log_truth", "strict joint", "have at most 1e8 entries", shown)
    values = {v: _column_places(graph, keys, v, rows, len(base)) for v in data - drawn}
    for v, places in values.items():
        support = graph.supports[v]
        if bool(((places < 0) | (places >= len(support))).any()):
            _check.fail(ValueError, "nesy", "observed values", f"be in {support}", "others")
    for axis, v in enumerate(base):
        shape = [1] * (len(base) + 1)
        shape[axis + 1] = sizes[axis]
        values[v] = torch.arange(sizes[axis]).view(shape)
    for m in graph.maps:  # in the order of the program: arguments come first
        table = torch.from_numpy(m.table)
        values[m.output] = table[tuple(values[a] for a in m.arguments)]
    total = _weights(graph, keys, values, dtype)
    for v, known in graph.known.items():
        if v in data - drawn:
            continue
        place = (
            known.place
            if known.place is not None
            else _column_places(graph, keys, v, rows, len(base))
        )
        total = torch.where(values[v] == place, total, -math.inf)
    full = total.expand(rows, *sizes)
    return log_sum(full.reshape(rows, -1))


def _column_places(graph: Graph, keys: Keys, variable: int, rows: int, dims: int) -> Tensor:
    column = graph.known[variable].column
    assert column is not None
    places = Places.of(graph.supports[variable])(keys.columns[column].values) - 1
    return places.view(rows, *[1] * dims)  # -1 or the number of values: none of them


def _weights(
    graph: Graph, keys: Keys, values: dict[int, Tensor], dtype: torch.dtype | None
) -> Tensor:
    total = torch.zeros((), dtype=dtype)
    for weight in graph.weights:
        leaf: Leaf = keys.leaves[weight.leaf]
        table = leaf.source.log_weights(*leaf.inputs, dtype=dtype)
        parent = leaf.source.parent_support is not None
        if table.dim() == 1 + parent:
            table = table.unsqueeze(0)
        index = [torch.arange(len(table)).view(-1, *[1] * (values[weight.scope[-1]].dim() - 1))]
        if parent:
            rows = torch.tensor(weight.rows)
            index.append(rows[0] if weight.fixed else rows[values[weight.scope[0]]])
        total = total + table[(*index, values[weight.scope[-1]])]
    return total
