"""The order in which variables are summed out, and the steps that this takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sapwood.nesy import kernels
from sapwood.nesy.factors import Graph, Map, Weight
from sapwood.nesy.kernels import Kernel, Operand, Shape
from sapwood.nesy.supports import Indices

_FREE = (0, 0, 0, 0, 0)
#: Steps of fewer terms cost the same: what counts then is how many of them run side by side.
_SMALL = 256
#: A step with more combinations of evidence than this looks at its columns one by one.
_EVIDENCE = 4096


@dataclass(frozen=True)
class Input:
    """A weight that a step reads: a leaf, or the result of an earlier step."""

    leaf: int | None = None
    step: int | None = None


@dataclass
class Step:
    """One elimination."""

    kernel: Kernel
    inputs: list[Input]
    columns: list[tuple[int, int]]  # column of data, variable whose support it is looked up in
    eliminated: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass
class _Item:
    """A weight or a map, as something that variables are connected by."""

    scope: frozenset[int]
    weight: Weight | None = None
    map: Map | None = None
    source: Input | None = None
    level: int = 0  # steps that have to come before


@dataclass
class _Closure:
    """What eliminating a variable touches."""

    items: set[int]
    scope: set[int]
    determined: set[int]
    eliminated: set[int]
    cost: tuple[int, int, int, int, int]


class TableCache:
    """Kernels and composed tables by structure, so that equal steps are the same object."""

    def __init__(self) -> None:
        self._kernels: dict[Shape, Kernel] = {}
        self._composed: dict[tuple[object, ...], Indices] = {}
        self._alive: list[Indices] = []  # identities stay unique while these live

    def kernel(self, shape: Shape, tables: list[Indices]) -> Kernel:
        found = self._kernels.get(shape)
        if found is None:
            found = self._kernels[shape] = kernels.make(shape, tables)
            self._alive += tables
        return found

    def compose(self, outer: Map, inner: Map) -> Map:
        """The outer map with the inner one in place of its output."""
        before = [a for a in outer.arguments if a != inner.output]
        arguments = tuple(dict.fromkeys((*before, *inner.arguments)))
        where = {a: i for i, a in enumerate(arguments)}
        pattern = tuple(-1 if a == inner.output else where[a] for a in outer.arguments)
        key = (id(outer.table), id(inner.table), pattern, *(where[a] for a in inner.arguments))
        if key not in self._composed:
            sizes = [0] * len(arguments)
            for m in (outer, inner):
                for a, size in zip(m.arguments, m.table.shape, strict=True):
                    if a in where:
                        sizes[where[a]] = size
            self._composed[key] = _composed(outer, inner, where, sizes)
            self._alive += [outer.table, inner.table]
        return Map(outer.output, arguments, self._composed[key])


def _composed(outer: Map, inner: Map, where: dict[int, int], sizes: list[int]) -> Indices:
    grid = np.indices(sizes)
    middle = inner.table[tuple(grid[where[a]] for a in inner.arguments)]
    table: Indices = outer.table[
        tuple(middle if a == inner.output else grid[where[a]] for a in outer.arguments)
    ]
    return table


class Eliminator:
    """Sums variables out, the cheapest first.

    The cost is the number of terms, or of results where that is more. When a variable goes, so does
    everything that only its step still needs. Among small steps those that wait for no other come
    first, so that they can run side by side. Of equal costs the smaller joint comes first, then the
    order of the program decides. Before, functions of functions are composed where this makes no
    table larger.
    """

    def __init__(self, graph: Graph, cache: TableCache) -> None:
        self.steps: list[Step] = []
        self._graph = graph
        self._cache = cache
        self._items: dict[int, _Item] = {}
        self._touching: dict[int, set[int]] = {v: set() for v in range(len(graph.supports))}
        self._count = 0
        self._sizes = [len(s) for s in graph.supports]
        self._open = {
            v for v in self._touching if v not in graph.known and v not in graph.kept
        }  # to be summed out
        for weight in graph.weights:
            self._add(_Item(frozenset(weight.scope), weight=weight, source=Input(weight.leaf)))
        for m in graph.maps:
            self._add(_Item(frozenset((m.output, *m.arguments)), map=m))

    def run(self) -> list[Step]:
        """All steps; the last one gives the result."""
        for number, item in list(self._items.items()):
            if item.weight is not None and item.scope & self._graph.known.keys():
                self._step(_Closure({number}, set(item.scope), set(), set(), _FREE))
        for variable in sorted(self._open):
            if self._composes(variable):
                self._substitute(variable)
                self._open.discard(variable)
        costs = {v: self._closure(v) for v in self._open}
        while self._open:
            closure = min(
                (costs[v] for v in self._open),
                key=lambda c: c.cost,
            )
            changed = self._eliminate(closure)
            for v in changed & self._open:
                costs[v] = self._closure(v)
        self._finish()
        return self.steps

    def _add(self, item: _Item) -> None:
        self._items[self._count] = item
        for v in item.scope:
            self._touching[v].add(self._count)
        self._count += 1

    def _remove(self, number: int) -> _Item:
        item = self._items.pop(number)
        for v in item.scope:
            self._touching[v].discard(number)
        return item

    def _closure(self, variable: int) -> _Closure:
        items = set(self._touching[variable])
        scope = {variable}.union(*(self._items[i].scope for i in items))
        near = set().union(*(self._touching[v] for v in scope))
        level = max((self._items[i].level for i in items), default=0)
        items |= {
            i
            for i in near - items
            if self._items[i].scope <= scope and self._items[i].level <= level
        }
        return self._closed(items, scope, variable)

    def _closed(self, items: set[int], scope: set[int], variable: int) -> _Closure:
        maps = [m for i in items if (m := self._items[i].map) is not None]
        determined = {m.output for m in maps}
        gone = {v for v in scope & self._open if self._touching[v] <= items}
        known = self._graph.known
        joint = math.prod(self._sizes[v] for v in scope - determined if v not in known)
        agree = math.prod(self._sizes[v] for v in determined if v in known)
        result = math.prod(self._sizes[v] for v in scope - gone if v not in known)
        cost = max(-(-joint // agree), result)  # evidence leaves about so many terms
        waits = int(any(self._items[i].level for i in items))
        size = cost if cost > _SMALL else 0
        return _Closure(items, scope, determined, gone, (size, waits, cost, joint, variable))

    def _eliminate(self, closure: _Closure) -> set[int]:
        """Carries out one elimination; returns the variables whose costs may have changed."""
        maps = {i: m for i in closure.items if (m := self._items[i].map) is not None}
        if len(maps) == len(closure.items) and closure.eliminated <= closure.determined:
            changed = set(closure.scope)
            for variable in sorted(closure.eliminated):
                changed |= self._substitute(variable)
        else:
            columns = self._columns(closure.scope)
            if math.prod(self._sizes[v] + 2 for v in columns) > _EVIDENCE and len(columns) > 1:
                changed = self._mask(maps)
                if changed:
                    return changed | self._neighbours(changed)
            changed = set(closure.scope)
            self._step(closure)
        self._open -= closure.eliminated
        return changed | self._neighbours(changed)

    def _composes(self, variable: int) -> bool:
        """Whether it is a function, and everything else a function of it and its arguments."""
        items = [self._items[i] for i in self._touching[variable]]
        own = next((i for i in items if i.map is not None and i.map.output == variable), None)
        return own is not None and all(
            i.map is not None and {*i.map.arguments} <= own.scope for i in items
        )

    def _neighbours(self, variables: Iterable[int]) -> set[int]:
        items = set().union(*(self._touching[v] for v in variables))
        return set().union(*(self._items[i].scope for i in items))

    def _columns(self, scope: Iterable[int]) -> list[int]:
        known = self._graph.known
        return sorted(v for v in scope if v in known and known[v].column is not None)

    def _substitute(self, variable: int) -> set[int]:
        """Puts the definition of a variable into the functions of it."""
        touching = [self._items[i] for i in self._touching[variable]]
        inner = next(i.map for i in touching if i.map is not None and i.map.output == variable)
        changed: set[int] = set()
        for number in sorted(self._touching[variable]):
            outer = self._remove(number).map
            assert outer is not None
            changed |= {outer.output, *outer.arguments}
            if outer is not inner:
                composed = self._cache.compose(outer, inner)
                self._add(_Item(frozenset((composed.output, *composed.arguments)), map=composed))
        return changed

    def _mask(self, maps: dict[int, Map]) -> set[int]:
        """Turns maps with evidence into weights of 0 and -inf over their free variables."""
        changed: set[int] = set()
        for number, m in maps.items():
            scope = {m.output, *m.arguments}
            if m.output in self._graph.known or scope & set(self._columns(scope)):
                self._step(_Closure({number}, scope, {m.output}, set(), _FREE))
                changed |= scope
        return changed

    def _step(self, closure: _Closure) -> None:
        known = self._graph.known
        kept = tuple(sorted(v for v in closure.scope - closure.eliminated if v not in known))
        self.steps.append(self._made(closure, kept))
        level = 1 + max((self._items[i].level for i in closure.items), default=0)
        for number in closure.items:
            self._remove(number)
        source = Input(step=len(self.steps) - 1)
        self._add(_Item(frozenset(kept), weight=Weight(kept, -1), source=source, level=level))

    def _made(self, closure: _Closure, kept: tuple[int, ...]) -> Step:
        items = [self._items[i] for i in sorted(closure.items)]
        weights = sorted(
            (i for i in items if i.weight is not None),
            key=lambda i: i.weight.scope,  # type: ignore[union-attr]
        )
        maps = _in_order([i.map for i in items if i.map is not None])
        number = {v: i for i, v in enumerate(_by_appearance(weights, maps, closure.scope))}
        known = [v for v in number if v in self._graph.known]
        operands = [self._operand(i, number) for i in weights]
        shape = Shape(
            sizes=tuple(self._sizes[v] for v in number),
            operands=tuple(operands) or (Operand((), 1),),
            maps=tuple(
                (number[m.output], tuple(number[a] for a in m.arguments), id(m.table)) for m in maps
            ),
            known=tuple((number[v], self._graph.known[v].place) for v in known),
            kept=tuple(number[v] for v in kept),
            base=tuple(number[v] for v in number if v not in closure.determined),
        )
        columns = [
            (column, v) for v in known if (column := self._graph.known[v].column) is not None
        ]
        inputs = [i.source for i in weights if i.source is not None]
        kernel = self._cache.kernel(shape, [m.table for m in maps])
        return Step(kernel, inputs, columns, tuple(sorted(closure.eliminated)), kept)

    def _operand(self, item: _Item, number: dict[int, int]) -> Operand:
        weight = item.weight
        assert weight is not None
        sizes = [self._sizes[v] for v in weight.scope]
        rows = weight.rows
        if weight.leaf < 0 or rows is None:
            return Operand(tuple(number[v] for v in weight.scope), math.prod(sizes))
        size = weight.parents * sizes[-1]
        plain = not weight.fixed and rows == tuple(range(weight.parents))
        return Operand(
            tuple(number[v] for v in weight.scope), size, None if plain else rows, weight.fixed
        )

    def _finish(self) -> None:
        """Multiplies what is left over the kept variables into one result."""
        kept = set(self._graph.kept)
        groups = [{i} for i, item in self._items.items() if not item.scope & kept]
        for group in groups:  # one by one: their evidence would multiply
            (number,) = group
            item = self._items[number]
            if item.map is not None or item.source is None or item.source.step is None:
                outputs = set() if item.map is None else {item.map.output}
                self._step(_Closure(group, set(item.scope), outputs, set(), _FREE))
        items = set(self._items)
        scope = kept.union(*(self._items[i].scope for i in items))
        determined = {m.output for i in items if (m := self._items[i].map) is not None}
        single = len(items) == 1 and not determined and not scope & self._graph.known.keys()
        if single and next(iter(self._items.values())).source == Input(step=len(self.steps) - 1):
            return
        self._step(_Closure(items, scope, determined, set(), _FREE))


def _in_order(maps: list[Map]) -> list[Map]:
    """Every map after those whose outputs it needs."""
    waiting, done = {m.output: m for m in maps}, list[Map]()

    def visit(m: Map) -> None:
        if waiting.pop(m.output, None) is not None:
            for a in m.arguments:
                if a in waiting:
                    visit(waiting[a])
            done.append(m)

    for m in maps:
        visit(m)
    return done


def _by_appearance(weights: list[_Item], maps: list[Map], scope: Iterable[int]) -> list[int]:
    order: dict[int, None] = {}
    for item in weights:
        if item.weight is not None:
            order.update(dict.fromkeys(item.weight.scope))
    for m in maps:
        order.update(dict.fromkeys((*m.arguments, m.output)))
    order.update(dict.fromkeys(sorted(scope)))
    return list(order)
