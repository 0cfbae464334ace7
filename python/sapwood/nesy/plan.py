"""Plans: the steps of all paths, equal ones side by side, ready to run on any batch.

A plan depends on the structure of a trace alone. Steps of one level with the same structure (the
positions of a long addition, for example) run as one, with the instances as a leading dimension.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sapwood.nesy.elimination import Eliminator, Input, Step, TableCache
from sapwood.nesy.factors import Graph, GraphBuilder
from sapwood.nesy.kernels import Kernel
from sapwood.nesy.listed import Lists
from sapwood.nesy.supports import Support
from sapwood.nesy.trace import Keys, Path, Trace

_MOST_PLANS = 256
_SHORTEST_SCAN = 3


class Query(str, Enum):
    """What a plan sums."""

    TRUTH = "truth"  # the mass where guards and result are true
    EVIDENCE = "evidence"  # where the guards are true
    PRIOR = "prior"  # everywhere
    VALUES = "values"  # where the guards are true, for each value of the result


@dataclass(frozen=True)
class Reference:
    """One instance in the result of a group."""

    slot: int
    position: int


@dataclass(frozen=True)
class Access:
    """How the instances of an operand are read: from one slot, or each from its own."""

    slot: int | None
    places: slice | list[int] | None  # None: all of the slot
    references: tuple[Reference, ...] = ()


def _access(references: list[Reference], counts: list[int]) -> Access:
    if len({r.slot for r in references}) > 1:
        return Access(None, None, tuple(references))
    slot, places = references[0].slot, [r.position for r in references]
    step = places[1] - places[0] if len(places) > 1 else 1
    if step < 1 or places != list(range(places[0], places[-1] + 1, step)):
        return Access(slot, places)
    if len(places) == counts[slot]:
        return Access(slot, None)
    return Access(slot, slice(places[0], places[-1] + 1, step))


@dataclass
class Group:
    """Equal steps of one level; each instance has its own inputs and columns."""

    kernel: Kernel | None  # None: a chain of matrices
    inputs: list[list[Reference]]  # per operand, per instance; of a chain the vector, the matrices
    columns: list[list[int]]  # per column of evidence, per instance
    supports: list[Support]  # in which each column is looked up
    slot: int
    level: int  # steps of lower levels come before
    kept_size: int  # entries of a result
    instances: int = 0
    access: list[Access] = field(default_factory=list)


@dataclass
class PathPlan:
    """One path: its graph, its steps as they were found, and where its result is."""

    graph: Graph
    steps: list[Step]
    leaves: list[int | None]  # per variable of the path the number of its leaf, if it matters
    names: list[str]
    result: Reference | None = None  # None: no mass at all


@dataclass
class Plan:
    """Everything that can be known before the numbers."""

    query: Query
    paths: list[PathPlan]
    slots: list[list[int]] = field(default_factory=list)  # leaves evaluated together, [] for a one
    where: dict[int, Reference] = field(default_factory=dict)  # of each leaf
    groups: list[Group] = field(default_factory=list)
    support: Support | None = None  # of the result, for VALUES
    #: Instances, and entries of each, per slot: leaves come first, then the groups.
    counts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    #: What ``circuits.pieces_of`` made of the plan, by the slots of logits.
    pieces: dict[frozenset[int], Any] = field(default_factory=dict)
    _lists: dict[int, tuple[Lists, list[int]]] = field(default_factory=dict)

    @functools.cached_property
    def results(self) -> list[Reference]:
        """Where the result of each path is that has mass."""
        return [path.result for path in self.paths if path.result is not None]

    def lists(self, group: Group) -> tuple[Lists, list[int]]:
        """The entries of a step in the slots that it reads, laid end to end, and these slots.

        Made at first need: only sums without circuits read them.
        """
        if group.slot not in self._lists:
            self._lists[group.slot] = self._make_lists(group)
        return self._lists[group.slot]

    def _make_lists(self, group: Group) -> tuple[Lists, list[int]]:
        assert group.kernel is not None
        reads = sorted({r.slot for references in group.inputs for r in references})
        begins, total = dict[int, int](), 0
        for slot in reads:
            begins[slot] = total
            total += self.counts[slot] * self.sizes[slot]
        offsets = [
            [begins[r.slot] + r.position * self.sizes[r.slot] for r in instance]
            for instance in zip(*group.inputs, strict=True)
        ]
        if not group.inputs:
            reads, total, offsets = [self.slots.index([])], 1, [[0]] * group.instances
        return Lists(group.kernel.table, offsets, total, group.kept_size), reads

    @property
    def leaves(self) -> Iterable[int]:
        """The leaves whose weights are needed."""
        return self.where


class PlanCache:
    """The plans used last, by the structure of their traces."""

    def __init__(self, most: int = _MOST_PLANS) -> None:
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._most = most
        self.compiled = 0

    def get(self, trace: Trace, keys: Keys, query: Query, *, everything: bool = False) -> Plan:
        """The plan of a trace; ``keys`` then numbers what the trace reads."""
        key = _key(trace, keys, query, everything)
        plan = self._plans.get(key)
        if plan is None:
            self.compiled += 1
            plan = self._plans[key] = compile_plan(trace, keys, query, everything=everything)
            if len(self._plans) > self._most:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan


PLANS = PlanCache()


def _key(trace: Trace, keys: Keys, query: Query, everything: bool) -> Hashable:
    parts: list[Hashable] = [query, everything]
    for path in trace.paths:
        structure = keys.path(path)
        if query is Query.TRUTH:
            result: Hashable = keys.constraint(path.result)
        else:
            result = keys.expression(path.result) if query is Query.VALUES else None
        parts.append((structure, result, keys.nodes()))
    return (*parts, keys.sources())


def compile_plan(trace: Trace, keys: Keys, query: Query, *, everything: bool = False) -> Plan:
    """Orders the eliminations of every path and puts equal steps side by side.

    Args:
        trace: the paths.
        keys: has numbered what the trace reads.
        query: what to sum.
        everything: keep draws that nothing depends on, for assignments of all variables.
    """
    cache = TableCache()
    paths = [_plan_path(path, keys, query, cache, everything) for path in trace.paths]
    plan = Plan(query, paths)
    if query is Query.VALUES:
        values = [v for path in trace.paths for v in path.result.support.values]
        plan.support = Support(dict.fromkeys(values))
    _place_leaves(plan, keys)
    _place_steps(plan)
    return plan


def graph_of(path: Path, keys: Keys, query: Query, *, everything: bool = False) -> Graph:
    """The factor graph of one path."""
    builder = GraphBuilder(path, keys, everything=everything)
    builder.require(path.decisions)
    if query is not Query.PRIOR:
        builder.require(path.guards)
    if query is Query.TRUTH:
        builder.require([path.result])
    if query is Query.VALUES:
        builder.keep(path.result)
    return builder.graph


def _plan_path(
    path: Path, keys: Keys, query: Query, cache: TableCache, everything: bool
) -> PathPlan:
    graph = graph_of(path, keys, query, everything=everything)
    leaves: list[int | None] = [None] * len(path.variables)
    for weight in graph.weights:
        leaves[path.names.index(graph.names[weight.scope[-1]])] = weight.leaf
    if not graph.possible:
        return PathPlan(graph, [], leaves, path.names)
    return PathPlan(graph, Eliminator(graph, cache).run(), leaves, path.names)


def _place_leaves(plan: Plan, keys: Keys) -> None:
    """Leaves of one source with inputs of one shape share a slot: one call of the network."""
    found: dict[Hashable, int] = {}
    for path in plan.paths:
        for step in path.steps:
            for source in step.inputs:
                if source.leaf is None or source.leaf in plan.where:
                    continue
                leaf = keys.leaves[source.leaf]
                single = None if leaf.batched else source.leaf
                key = (leaf.source.key, tuple(x.shape[1:] for x in leaf.inputs), single)
                slot = found.setdefault(key, len(plan.slots))
                if slot == len(plan.slots):
                    plan.slots.append([])
                plan.where[source.leaf] = Reference(slot, len(plan.slots[slot]))
                plan.slots[slot].append(source.leaf)


@dataclass
class _Node:
    """A step, or a chain of steps, with what it waits for."""

    group_key: Hashable
    kernel: Kernel | None
    inputs: list[Input]
    columns: list[tuple[int, Support]]
    level: int
    kept_size: int


def _place_steps(plan: Plan) -> None:
    groups: OrderedDict[tuple[int, Hashable], Group] = OrderedDict()
    results: list[dict[int, Reference]] = [{} for _ in plan.paths]
    nodes = [_nodes(path) for path in plan.paths]
    order = [(node, number, path) for path, own in enumerate(nodes) for number, node in own]
    order.sort(key=lambda entry: entry[0].level)  # stable: paths and steps keep their order
    if any(not node.inputs for own in nodes for _, node in own):
        plan.slots.append([])  # a weight of one, for steps that read evidence alone
    first = len(plan.slots)
    for node, number, path in order:
        key = (node.level, node.group_key)
        if key not in groups:
            supports = [s for _, s in node.columns]
            groups[key] = Group(
                node.kernel, [[] for _ in node.inputs], [[] for _ in supports], supports,
                first + len(groups), node.level, node.kept_size,
            )  # fmt: skip
        group = groups[key]
        for operand, source in zip(group.inputs, node.inputs, strict=True):
            operand.append(_reference(plan, results[path], source))
        for instances, (column, _) in zip(group.columns, node.columns, strict=True):
            instances.append(column)
        results[path][number] = Reference(group.slot, group.instances)
        group.instances += 1
    plan.groups = list(groups.values())
    counts = [max(1, len(s)) for s in plan.slots] + [g.instances for g in plan.groups]
    for group in plan.groups:
        operands = group.inputs
        if group.kernel is None:  # the vector of a chain, then all of its matrices
            operands = [group.inputs[0], [refs[0] for refs in group.inputs[1:]]]
        group.access = [_access(references, counts) for references in operands]
    _measure(plan, counts)
    for path, own in enumerate(nodes):
        if own:
            plan.paths[path].result = results[path][own[-1][0]]


def _measure(plan: Plan, counts: list[int]) -> None:
    """Instances and entries of every slot."""
    plan.counts, plan.sizes = counts, [1] * len(counts)
    for group in plan.groups:
        plan.sizes[group.slot] = group.kept_size
        if group.kernel is not None:
            sizes = [operand.size for operand in group.kernel.shape.operands]
        else:  # a vector and matrices
            sizes = [group.kept_size, *[group.kept_size**2] * (len(group.inputs) - 1)]
        for size, references in zip(sizes, group.inputs, strict=False):
            for reference in references:
                plan.sizes[reference.slot] = size


def _reference(plan: Plan, done: dict[int, Reference], source: Input) -> Reference:
    if source.leaf is not None:
        return plan.where[source.leaf]
    assert source.step is not None
    return done[source.step]


def _nodes(path: PathPlan) -> list[tuple[int, _Node]]:
    """The steps of a path with runs of equal square matrices as chains, by number and level."""
    chains = _chains(path.steps)
    inside = {n for chain in chains for n in chain[:-1]}
    by_end = {chain[-1]: chain for chain in chains}
    levels: dict[int, int] = {}
    nodes: list[tuple[int, _Node]] = []
    for number, step in enumerate(path.steps):
        if number in inside:
            continue
        inputs, kernel = step.inputs, step.kernel
        key: Hashable = (id(kernel), tuple(id(path.graph.supports[v]) for _, v in step.columns))
        if number in by_end:
            chain = by_end[number]
            matrices = [path.steps[n].inputs[1] for n in chain]
            inputs = [path.steps[chain[0]].inputs[0], *matrices]
            key = ("chain", id(path), number)
        elif not inputs and not step.columns:
            key = ("constant", id(path), number)
        level = 1 + max((levels[i.step] for i in inputs if i.step is not None), default=0)
        columns = [(column, path.graph.supports[v]) for column, v in step.columns]
        levels[number] = level
        own = None if number in by_end else kernel
        node = _Node(key, own, list(inputs), columns, level, kernel.kept_size)
        nodes.append((number, node))
    return nodes


def _chains(steps: list[Step]) -> list[list[int]]:
    """Runs of vector times square matrix, each of which continues the one before."""
    chains: list[list[int]] = []
    current: list[int] = []
    for number, step in enumerate(steps):
        links = _is_link(step)
        if links and current and step.inputs[0].step == current[-1]:
            current.append(number)
        else:
            chains.append(current)
            current = [number] if links else []
    chains.append(current)
    return [c for c in chains if len(c) >= _SHORTEST_SCAN]


def _is_link(step: Step) -> bool:
    """Whether a step is a vector times a matrix, in this order and of one size."""
    shape = step.kernel.shape
    if shape.maps or shape.known or len(shape.operands) != 2:
        return False
    vector, matrix = shape.operands
    square = matrix.size == vector.size**2 and len(matrix.scope) == 2
    plain = vector.rows is None and matrix.rows is None
    return (
        plain
        and square
        and len(vector.scope) == 1
        and matrix.scope[0] == vector.scope[0]
        and shape.kept == matrix.scope[1:]
    )
