"""The steps of a plan as sum-product circuits: one op for all that stand together.

Listed steps and short chains become sums of a ``LogCircuit``, which walks them row by row. Most
plans are one; einsums, convolutions and long chains have ops of their own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sapwood._register import callable_for
from sapwood.nesy import chain
from sapwood.nesy.plan import Group, Plan, Reference
from sapwood.nesy.supports import Indices, Places, Support
from sapwood.ops.logsemiring import CircuitSum, LogCircuit, Selector

# The public function checks its arguments, which costs as much as the op.
_log_circuit = callable_for("log_circuit")

#: Chains of more terms are left to ``log_scan``, which takes several side by side.
_LONGEST_CHAIN = 1024


class Lookup(NamedTuple):
    """A column of data and the support in which it is looked up."""

    column: int
    support: Support

    @property
    def first(self) -> int:
        """What the first value of the support is in the evidence of the circuit."""
        first = self.support.first_integer
        return 1 if first is None else first

    def read(self, columns: Sequence[Tensor] | Tensor) -> Tensor:
        """(B,) int64: integers as they are, other values as their place in the support."""
        values = chain.column_of(columns, self.column)
        if self.support.first_integer is not None and not values.is_floating_point():
            return values.long()
        return Places.of(self.support)(values) + (self.first - 1)


@dataclass
class Piece:
    """Steps that run as one circuit."""

    circuit: LogCircuit
    reads: list[int]  # slots, side by side in the inputs
    writes: list[Group]  # whose results the circuit gives, one after the other
    lookups: list[Lookup]  # the columns of its evidence
    in_order: bool = field(init=False)  # they are the first columns of data, all of integers

    def __post_init__(self) -> None:
        self.in_order = all(
            lookup.column == number and lookup.support.first_integer is not None
            for number, lookup in enumerate(self.lookups)
        )

    def evidence(self, columns: Sequence[Tensor] | Tensor) -> Tensor | None:
        """(B, E) int64, or None where the circuit reads no data."""
        if not self.lookups:
            return None
        if self.in_order and isinstance(columns, Tensor) and columns.dtype == torch.int64:
            return columns
        if self.in_order and len(columns) == 1 and columns[0].dtype == torch.int64:
            return columns[0].unsqueeze(1)
        found = [lookup.read(columns) for lookup in self.lookups]
        return found[0].unsqueeze(1) if len(found) == 1 else torch.stack(found, 1)

    def truth(self, logits: Tensor, evidence: Tensor | None) -> Tensor:
        """(B, 1) the only result, from the logits (n * B, size) of the only slot."""
        size, circuit = logits.shape[1], self.circuit
        x = logits.view(circuit.inputs // size, -1, size)
        found: Tensor = _log_circuit(x, evidence, circuit.tables(x.device), circuit.counts)
        return found

    def run(self, slots: Sequence[Tensor], rows: int, columns: Sequence[Tensor] | Tensor) -> Tensor:
        """(B, R) the results of ``writes``, given (n, B or 1, size) per slot."""
        given = [slots[number] for number in self.reads]
        if len(given) == 1 and given[0].shape[1] == rows:
            x = given[0]
        else:
            flat = [slot.transpose(0, 1).expand(rows, -1, -1).flatten(1) for slot in given]
            x = torch.cat(flat, 1).unsqueeze(0)
        tables = self.circuit.tables(x.device)
        found: Tensor = _log_circuit(x, self.evidence(columns), tables, self.circuit.counts)
        return found


def has_circuit(group: Group) -> bool:
    """Whether a step can be part of a circuit."""
    if group.kernel is None:
        return (len(group.inputs) - 1) * group.kept_size**2 <= _LONGEST_CHAIN
    return group.kernel.kind == "listed"


class Pieces(NamedTuple):
    """All steps of a plan in order."""

    steps: list[Piece | Group]
    heads: frozenset[int]  # slots of logits that the circuit normalises; no other piece reads them


def pieces_of(plan: Plan, logits: frozenset[int]) -> Pieces:
    """The circuits of a plan and the steps between them, made once.

    Args:
        plan: its groups are in the order of their levels.
        logits: slots of leaves that are still to be normalised.
    """
    found: Pieces | None = plan.pieces.get(logits)
    if found is None:
        heads = logits if all(map(has_circuit, plan.groups)) else frozenset[int]()
        steps: list[Piece | Group] = []
        for together, run in itertools.groupby(plan.groups, has_circuit):
            own = list(run)
            steps += [_piece(plan, own, heads)] if together else own
        found = plan.pieces[logits] = Pieces(steps, heads)
    return found


def _needed(plan: Plan, own: Sequence[Group]) -> list[Group]:
    """The steps that something outside reads."""
    inside = {group.slot for group in own}
    outside = [
        r
        for group in plan.groups
        if group.slot not in inside
        for references in group.inputs
        for r in references
    ]
    slots = {r.slot for r in (*outside, *plan.results)}
    return [group for group in own if group.slot in slots]


def _piece(plan: Plan, own: Sequence[Group], heads: Container[int]) -> Piece:
    """Some steps as one circuit."""
    inside = {group.slot for group in own}
    read = {r.slot for group in own for references in group.inputs for r in references}
    if any(not group.inputs for group in own):
        read.add(plan.slots.index([]))
    reads = sorted(read - inside)
    begins, normalised, inputs = dict[int, int](), list[tuple[int, int]](), 0
    for slot in reads:
        begins[slot], size = inputs, plan.sizes[slot]
        inputs += plan.counts[slot] * size
        if slot in heads:
            normalised += [(i, i + size) for i in range(begins[slot], inputs, size)]
    lookups = _lookups(own)
    sums: list[CircuitSum] = []
    for group in own:
        begins[group.slot] = inputs + len(sums)
        if group.kernel is None:
            sums += _chain(plan, group, begins)
            begins[group.slot] = inputs + len(sums) - group.kept_size
            continue
        for instance in range(group.instances):
            sums += _instance(plan, group, instance, begins, lookups)
    writes = _needed(plan, own)
    results = [
        begins[group.slot] + i for group in writes for i in range(group.instances * group.kept_size)
    ]
    return Piece(LogCircuit(inputs, sums, results, normalised), reads, writes, lookups)


def _lookups(own: Sequence[Group]) -> list[Lookup]:
    found = dict.fromkeys(
        Lookup(column, support)
        for group in own
        for instances, support in zip(group.columns, group.supports, strict=True)
        for column in instances
    )
    return sorted(found, key=lambda lookup: lookup.column)  # stable: equal plans are equal


def _begin(plan: Plan, reference: Reference, begins: dict[int, int]) -> int:
    return begins[reference.slot] + reference.position * plan.sizes[reference.slot]


def _chain(plan: Plan, group: Group, begins: dict[int, int]) -> list[CircuitSum]:
    """A vector times matrices: k sums for each, of which the last ones are the result."""
    k, column, sums = group.kept_size, begins[group.slot], list[CircuitSum]()
    state = np.arange(k) + _begin(plan, group.inputs[0][0], begins)
    for (matrix,) in group.inputs[1:]:
        entries = np.arange(k * k).reshape(k, k) + _begin(plan, matrix, begins)
        sums += [CircuitSum(np.stack([state, entries[:, j]], 1)[None]) for j in range(k)]
        state = np.arange(k) + column
        column += k
    return sums


def _instance(
    plan: Plan, group: Group, instance: int, begins: dict[int, int], lookups: list[Lookup]
) -> list[CircuitSum]:
    """The sums of one instance of a listed step, one for each entry of its result."""
    kernel = group.kernel
    assert kernel is not None
    operands = [_begin(plan, references[instance], begins) for references in group.inputs]
    if not operands:
        operands = [begins[plan.slots.index([])]]  # a weight of one
    shape = (len(operands), kernel.kept_size, kernel.width)
    table = kernel.table.reshape(*kernel.evidence, *shape)
    known: Indices = table[tuple(slice(1, -1) for _ in kernel.evidence)].reshape(-1, *shape)
    places = known.transpose(2, 0, 3, 1)  # (kept, lists, terms, operands)
    columns = np.where(places < 0, -1, places + np.array(operands))
    selectors, stride = list[Selector](), 1
    for own, support in reversed(list(zip(group.columns, group.supports, strict=True))):
        lookup = Lookup(own[instance], support)
        selectors.append(Selector(lookups.index(lookup), lookup.first, len(support), stride))
        stride *= len(support)
    return [CircuitSum(lists, selectors) for lists in columns]


def run(
    plan: Plan,
    leaves: Sequence[Tensor],
    logits: frozenset[int],
    columns: Sequence[Tensor] | Tensor,
    rows: int,
) -> list[Tensor]:
    """The results with the log-sum-exp, (B or 1, kept) each.

    Args:
        plan: what to do.
        leaves: per slot the weights of its n leaves one after the other, (n * (B or 1), ...).
        logits: slots of leaves that are still to be normalised.
        columns: the data, (B,) each or (B, C) together.
        rows: B.
    """
    pieces, heads = pieces_of(plan, logits)
    slots: list[Tensor] = [widened(x) if n in logits else x for n, x in enumerate(leaves)]
    for number in logits - heads:
        slots[number] = torch.log_softmax(slots[number], -1)
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in slots])
    for number, x in enumerate(slots):
        count = plan.counts[number]
        slots[number] = x.to(dtype).reshape(count, x.shape[0] // count, plan.sizes[number])
    for piece in pieces:
        if isinstance(piece, Piece):
            found = piece.run(slots, rows, columns)
            alone = len(pieces) == len(plan.results) == 1
            if alone and found.shape[1] == plan.sizes[plan.results[0].slot]:
                return [found]  # as it is: each view is a node of autograd
            parts = found.split([g.instances * g.kept_size for g in piece.writes], 1)
            for group, part in zip(piece.writes, parts, strict=True):
                own = part.unflatten(1, (group.instances, group.kept_size))
                _put(slots, group.slot, own.transpose(0, 1))
        else:
            operands = [chain.operand(a, lambda n: slots[n].transpose(0, 1)) for a in piece.access]
            _put(slots, piece.slot, chain.other(piece, operands).transpose(0, 1))
    return [slots[r.slot][r.position] for r in plan.results]


def _put(slots: list[Tensor], number: int, value: Tensor) -> None:
    """Slots of steps that nothing outside their circuit reads stay empty."""
    slots += [value[:0]] * (number + 1 - len(slots))
    slots[number] = value


def widened(logits: Tensor) -> Tensor:
    """Logits of an autocast network are normalised in float32, as torch does it on a GPU."""
    narrow = logits.dtype in (torch.bfloat16, torch.float16)
    return logits.float() if narrow and torch.is_autocast_enabled(logits.device.type) else logits
