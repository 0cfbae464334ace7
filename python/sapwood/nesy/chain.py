"""The steps of a plan one after the other, with any sum and with derivatives of any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.nesy import kernels, listed
from sapwood.nesy.kernels import Reduce
from sapwood.nesy.plan import Access, Group, Plan
from sapwood.nesy.supports import Places


@dataclass
class Steps:
    """What to run, and on which data."""

    plan: Plan
    columns: Sequence[Tensor] | Tensor  # of data, (B,) each or (B, C) together
    rows: int  # B, copies included
    reduce: Reduce
    copies: int = 1

    def evidence(self, group: Group) -> Tensor | None:
        """(G, B): the row of the step's tables for every instance and row of the batch."""
        if not group.columns:
            return None
        assert group.kernel is not None
        total: Tensor | None = None
        for instances, support, size in zip(
            group.columns, group.supports, group.kernel.evidence, strict=True
        ):
            values = [column_of(self.columns, i) for i in instances]
            stacked = values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
            places = Places.of(support)(stacked)
            total = places if total is None else total * size + places
        assert total is not None
        return total if self.copies == 1 else total.repeat_interleave(self.copies, 1)


def slot_of(weights: Tensor, count: int) -> Tensor:
    """(B or 1, n, size) from the weights of n leaves one after the other, (n * (B or 1), ...)."""
    rows, size = weights.shape[0] // count, math.prod(weights.shape[1:])
    return weights.reshape(count, rows, size).transpose(0, 1)


def column_of(columns: Sequence[Tensor] | Tensor, number: int) -> Tensor:
    """(B,) one of the columns of data, (B,) each or (B, C) together."""
    return columns.select(1, number) if isinstance(columns, Tensor) else columns[number]


def plain(steps: Steps, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results, each (B or 1, kept), step by step, with derivatives of any order.

    Args:
        steps: what to run.
        leaves: (B or 1, n, size) per slot of leaves.
    """
    slots = list(leaves)
    for group in steps.plan.groups:
        if group.kernel is None:
            vector, matrices = [operand(a, slots.__getitem__) for a in group.access]
            slots.append(kernels.scan(vector, matrices, steps.reduce))
        else:
            lists, reads = steps.plan.lists(group)
            terms = listed.terms(lists, steps.evidence(group), [slots[s] for s in reads])
            slots.append(steps.reduce(terms))
    return [slots[r.slot][:, r.position] for r in steps.plan.results]


def operand(access: Access, slot: Callable[[int], Tensor]) -> Tensor:
    """(B or 1, G, size): the instances of an operand, without a copy where they lie evenly."""
    if access.slot is not None:
        whole = slot(access.slot)
        return whole if access.places is None else whole[:, access.places]
    parts = [slot(r.slot)[:, r.position] for r in access.references]
    rows = listed.common_rows(parts)
    return torch.stack([p.expand(rows, -1) for p in parts], 1)


def other(group: Group, operands: list[Tensor]) -> Tensor:
    """A long chain of matrices, or a step with an op of its own, by the log-sum-exp."""
    if group.kernel is not None:
        return kernels.run(group.kernel, operands)
    rows = listed.common_rows(operands)
    vector, matrices = (x.expand(rows, -1, -1) for x in operands)
    return kernels.log_chain(vector, matrices)
