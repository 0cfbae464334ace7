"""Where everything of a plan lies in one workspace, and its listed steps as few gathers.

The workspace has a row per sample. Its columns are the leaves, then the results of all steps in
order. Listed steps of one level read it with one gather: a stage. A truth is then a dozen tensor
calls whatever its number of steps, which is what small problems cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sapwood.nesy.supports import Indices, Places, Support

if TYPE_CHECKING:
    from sapwood.nesy.plan import Group

#: Columns of the workspace that hold no mass, and mass one.
NO_MASS, ONE = 0, 1
#: Steps are put side by side when their lists, padded to one length, have at most so many places,
_SMALL = 2048
#: or so many times as many as they had alone.
_PADDING = 2


@dataclass(frozen=True)
class Region:
    """A slot in the workspace."""

    begin: int
    count: int  # instances
    size: int  # entries of each

    @property
    def end(self) -> int:
        return self.begin + self.count * self.size

    def of(self, work: Tensor) -> Tensor:
        """(B, count, size)."""
        size = (work.shape[0], self.count, self.size)
        return work.as_strided(size, (work.stride(0), self.size, 1), self.begin)

    def by_leaf(self, work: Tensor) -> Tensor:
        """(count, B, size)."""
        size = (self.count, work.shape[0], self.size)
        return work.as_strided(size, (self.size, work.stride(0), 1), self.begin)


def column_of(columns: Sequence[Tensor] | Tensor, number: int) -> Tensor:
    """(B,) one of the columns of data, (B,) each or (B, C) together."""
    return columns.select(1, number) if isinstance(columns, Tensor) else columns[number]


class Lookup(NamedTuple):
    """A column of data, the support in which it is looked up, and what a place counts for."""

    column: int
    support: Support | None  # None: counts for nothing
    factor: int


@dataclass(frozen=True)
class Lookups:
    """All lookups of a plan, (L,) each."""

    items: list[Lookup]
    which: Tensor  # the columns
    whole: bool  # these are the first columns, in order
    low: Tensor  # the unknown value below the support; 0 where that is no run of integers
    high: Tensor  # the one above
    bounds: tuple[int, int] | None  # low and high where all are the same
    factors: Tensor | None  # None: all are 1
    consecutive: bool

    def read(self, columns: Sequence[Tensor] | Tensor) -> Tensor:
        """(B, L) int64: the place of each value in its support plus ``low``, times the factor.

        Args:
            columns: (B,) each, or (B, C) together.
        """
        given = [columns] if isinstance(columns, Tensor) else columns
        if not self.consecutive or any(c.is_floating_point() for c in given):
            found = torch.stack([_searched(columns, item) for item in self.items], 1) + self.low
            return found if self.factors is None else found * self.factors
        if isinstance(columns, Tensor):
            whole = self.whole and columns.shape[1] == len(self.items)
            values = columns if whole else columns.index_select(1, self.which)
        elif len(self.items) == 1:
            values = columns[self.items[0].column].unsqueeze(1)
        else:
            values = torch.stack([columns[item.column] for item in self.items], 1)
        if values.dtype != torch.int64:
            values = values.long()
        if self.bounds is not None:
            values = values.clamp(*self.bounds)
        else:
            values = values.clamp(self.low, self.high)
        return values if self.factors is None else values * self.factors


def _searched(columns: Sequence[Tensor] | Tensor, item: Lookup) -> Tensor:
    values = column_of(columns, item.column)
    if item.support is None:
        return torch.zeros_like(values, dtype=torch.int64)
    return Places.of(item.support)(values)


@dataclass(frozen=True)
class Stage:
    """Listed steps side by side: each output is the sum of a list of products."""

    table: Tensor  # (operands, lists, width) columns of the workspace
    first: Tensor  # (J,) which list of each output belongs to evidence of zeros
    ranks: list[Tensor]  # (J,) each: the lookups that lead each output to its list
    direct: bool  # all outputs have the only lookup
    operands: int
    width: int
    begin: int  # of the results in the workspace
    segments: Tensor  # (J + 1,) where the terms of each output begin
    read: bool  # by later steps; otherwise its results stay out of the workspace

    @property
    def outputs(self) -> int:
        return self.first.shape[0]

    def index(self, evidence: Tensor | None, rows: int) -> Tensor:
        """(operands, B, J * width): the columns that each row reads."""
        if not self.ranks:
            return self.table.view(self.operands, 1, -1).expand(-1, rows, -1)
        assert evidence is not None
        lists = self.first
        for rank in self.ranks:
            lists = lists + (evidence if self.direct else evidence.index_select(1, rank))
        width = self.outputs * self.width
        return self.table.index_select(1, lists.view(-1)).view(self.operands, rows, width)


@dataclass
class Layout:
    """The workspace of a plan and what fills it."""

    width: int
    regions: list[Region | None]  # of every slot; None for a leaf that no stage reads
    steps: list[Stage | int] = field(default_factory=list)  # an int: a group with an op of its own
    lookups: Lookups | None = None
    uses_one: bool = False
    stage_of: dict[int, Stage] = field(default_factory=dict)  # by slot
    _moved: dict[torch.device, Layout] = field(default_factory=dict)

    def on(self, device: torch.device) -> Layout:
        """The same with its tables on a device."""
        if device.type == "cpu":
            return self
        found = self._moved.get(device)
        if found is None:
            steps = [s if isinstance(s, int) else _moved(s, device) for s in self.steps]
            seen = self.lookups
            if seen is not None:
                seen = replace(
                    seen, which=seen.which.to(device), low=seen.low.to(device),
                    high=seen.high.to(device), factors=_to(seen.factors, device),
                )  # fmt: skip
            found = self._moved[device] = replace(self, steps=steps, lookups=seen)
            by_begin = {step.begin: step for step in steps if isinstance(step, Stage)}
            found.stage_of = {slot: by_begin[s.begin] for slot, s in self.stage_of.items()}
        return found


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _moved(stage: Stage, device: torch.device) -> Stage:
    return replace(
        stage, table=stage.table.to(device), first=stage.first.to(device),
        ranks=[rank.to(device) for rank in stage.ranks], segments=stage.segments.to(device),
    )  # fmt: skip


def lay_out(groups: Sequence[Group], counts: Sequence[int], sizes: Sequence[int]) -> Layout:
    """Gives every slot its place, and puts the listed steps of each level side by side.

    Args:
        groups: in the order of their levels.
        counts: instances per slot; leaves come first, then the groups.
        sizes: entries of an instance per slot.
    """
    leaves = len(counts) - len(groups)
    read = {r.slot for g in groups if g.listed for instances in g.inputs for r in instances}
    by_others = {
        r.slot for g in groups if not g.listed for instances in g.inputs for r in instances
    }
    layout, column = Layout(0, []), 2
    for slot in range(leaves):
        region = Region(column, counts[slot], sizes[slot]) if slot in read else None
        column = column if region is None else region.end
        layout.regions.append(region)
    layout.regions += [None] * len(groups)
    parts = _side_by_side(groups)
    begins = []
    for part in parts:
        begins.append(column)
        for number in part:
            slot = leaves + number
            region = layout.regions[slot] = Region(column, counts[slot], sizes[slot])
            column = region.end
    layout.width = column
    listed = [number for part in parts for number in part if groups[number].listed]
    layout.lookups = _lookups([groups[number] for number in listed])
    for part, begin in zip(parts, begins, strict=True):
        if not groups[part[0]].listed:
            layout.steps.append(part[0])
            continue
        slots = [leaves + number for number in part]
        needed = any(slot in read or slot in by_others for slot in slots)
        stage = replace(_stage(part, groups, layout, begin), read=needed)
        layout.stage_of |= dict.fromkeys(slots, stage)
        layout.uses_one |= bool((stage.table == ONE).any())
        layout.steps.append(stage)
    return layout


def _side_by_side(groups: Sequence[Group]) -> list[list[int]]:
    """Which groups run together: listed ones of a level whose padding stays small."""
    parts: list[list[int]] = []
    for number, group in enumerate(groups):
        for part in parts:
            together = [groups[n] for n in (*part, number)]
            if together[0].level == group.level and _fits(together):
                part.append(number)
                break
        else:
            parts.append([number])
    return parts


def _fits(together: Sequence[Group]) -> bool:
    if not all(g.listed for g in together):
        return False
    operands = max(len(g.inputs) for g in together)
    width, outputs, alone = 0, 0, 0
    for group in together:
        assert group.kernel is not None
        outputs += group.instances * group.kernel.kept_size
        width = max(width, group.kernel.width)
        alone += group.instances * group.kernel.entries * max(1, len(group.inputs))
    padded = outputs * width * max(1, operands)
    return padded <= max(_SMALL, _PADDING * alone)


def _lookups(groups: Sequence[Group]) -> Lookups | None:
    items = sorted(
        dict.fromkeys(
            item for group in groups for i in range(group.instances) for item in _own(group, i)
        ),
        key=lambda item: (item.column, item.factor),
    )  # stable: equal plans have equal tables
    if not items:
        return None
    if len({len(group.columns) for group in groups}) > 1:
        items.append(Lookup(0, None, 1))  # of outputs that have fewer lookups than others
    firsts = [0 if item.support is None else item.support.first_integer for item in items]
    low = [
        0 if item.support is None or first is None else first - 1
        for item, first in zip(items, firsts, strict=True)
    ]
    high = [
        at if item.support is None else at + len(item.support) + 1
        for at, item in zip(low, items, strict=True)
    ]
    same = len(set(low)) == len(set(high)) == 1
    columns = [item.column for item in items]
    factors = [item.factor for item in items]
    return Lookups(
        items,
        torch.tensor(columns),
        columns == list(range(len(columns))),
        torch.tensor(low),
        torch.tensor(high),
        (low[0], high[0]) if same else None,
        torch.tensor(factors) if set(factors) != {1} else None,
        None not in firsts,
    )


def _own(group: Group, instance: int) -> list[Lookup]:
    """The lookups of an instance; a list further on in the last is the next one."""
    assert group.kernel is not None
    found, factor = list[Lookup](), 1
    for number in range(len(group.columns) - 1, -1, -1):
        found.append(Lookup(group.columns[number][instance], group.supports[number], factor))
        factor *= group.kernel.evidence[number]
    return found


def _stage(part: Sequence[int], groups: Sequence[Group], layout: Layout, begin: int) -> Stage:
    own = [groups[n] for n in part]
    operands = max(1, *(len(g.inputs) for g in own))
    width = max(g.kernel.width for g in own if g.kernel is not None)
    depth = max(len(g.columns) for g in own)
    tables: list[Indices] = []
    first: list[int] = []
    ranks: list[list[int]] = [[] for _ in range(depth)]
    lists = 0
    for group in own:
        assert group.kernel is not None
        options = len(group.kernel.table)  # rows of evidence
        for instance in range(group.instances):
            table = _columns(group, instance, layout, operands, width)  # (kept, options, ...)
            tables.append(table.reshape(-1, operands, width))
            numbers, shift = _numbers(_own(group, instance), layout.lookups, depth)
            for kept in range(group.kernel.kept_size):
                first.append(lists + kept * options - shift)
                for rank, number in zip(ranks, numbers, strict=True):
                    rank.append(number)
            lists += len(tables[-1])
    places = torch.from_numpy(np.concatenate(tables)).transpose(0, 1).contiguous()
    only = layout.lookups is not None and len(layout.lookups.items) == 1
    return Stage(
        places, torch.tensor(first), [torch.tensor(r) for r in ranks],
        only and depth == 1, operands, width, begin, torch.arange(len(first) + 1) * width, True,
    )  # fmt: skip


def _numbers(own: list[Lookup], lookups: Lookups | None, depth: int) -> tuple[list[int], int]:
    """Which lookups these are, filled up to ``depth``, and what their ``low`` counts for."""
    if depth == 0 or lookups is None:
        return [], 0
    numbers = [lookups.items.index(item) for item in own]
    shift = sum(int(lookups.low[n]) * lookups.items[n].factor for n in numbers)
    return numbers + [len(lookups.items) - 1] * (depth - len(own)), shift


def _columns(group: Group, instance: int, layout: Layout, operands: int, width: int) -> Indices:
    """(kept, rows of evidence, operands, width): the lists of one instance."""
    kernel = group.kernel
    assert kernel is not None
    given = kernel.table.reshape(len(kernel.table), -1, kernel.kept_size, kernel.width)
    given = given.transpose(2, 0, 1, 3)  # (kept, rows, operands, width)
    found = np.full((*given.shape[:2], operands, width), ONE, dtype=np.int64)
    for number in range(given.shape[2]):
        begin = ONE
        if group.inputs:
            reference = group.inputs[number][instance]
            region = layout.regions[reference.slot]
            assert region is not None
            begin = region.begin + reference.position * region.size
        places = given[:, :, number]
        found[:, :, number, : kernel.width] = np.where(places < 0, NO_MASS, places + begin)
    found[..., kernel.width :] = NO_MASS
    return found
