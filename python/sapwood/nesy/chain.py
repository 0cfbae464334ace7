"""All steps of a plan as one differentiable function.

A truth is a dozen small tensors. Through autograd each step would cost a node, a call from the
engine back into Python and the gradients of every slice; here one node walks the steps backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.nesy import kernels, listed
from sapwood.nesy.kernels import Reduce
from sapwood.nesy.plan import Access, Group, Reference


@dataclass
class Steps:
    """What to run on the slots of the leaves: groups, the evidence of each, and the results."""

    groups: list[Group]
    evidence: list[Tensor | None]
    results: list[Reference]
    reduce: Reduce
    fast: bool  # reduce is the log-sum-exp


def run(steps: Steps, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results, each (B or 1, kept): with the log-sum-exp as one node of autograd."""
    if steps.fast and torch.is_grad_enabled():
        return list(_Chain.apply(steps, *leaves))  # type: ignore[no-untyped-call]
    return plain(steps, leaves)


def plain(steps: Steps, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The same step by step, with derivatives of any order."""
    slots = list(leaves)
    for group, evidence in zip(steps.groups, steps.evidence, strict=True):
        if _is_listed(group, steps.fast):
            assert group.lists is not None
            terms = listed.terms(group.lists, evidence, [slots[s] for s in group.reads])
            slots.append(steps.reduce(terms))
        else:
            slots.append(_other(group, [operand(a, slots) for a in group.access], steps))
    return [slots[r.slot][:, r.position] for r in steps.results]


def _is_listed(group: Group, fast: bool) -> bool:
    return group.kernel is not None and (group.kernel.kind == "gather" or not fast)


def operand(access: Access, slots: Sequence[Tensor]) -> Tensor:
    """(B or 1, G, size): the instances of an operand, without a copy where they lie evenly."""
    if access.slot is not None:
        whole = slots[access.slot]
        return whole if access.places is None else whole[:, access.places]
    parts = [slots[r.slot][:, r.position] for r in access.references]
    rows = listed.common_rows(parts)
    return torch.stack([p.expand(rows, -1) for p in parts], 1)


def _other(group: Group, operands: list[Tensor], steps: Steps) -> Tensor:
    """A chain of matrices, or a step with an op of its own."""
    if group.kernel is None:
        rows = listed.common_rows(operands)
        vector, matrices = (x.expand(rows, -1, -1) for x in operands)
        return kernels.scan(vector, matrices, steps.reduce, fast=steps.fast)
    return kernels.run(group.kernel, operands)


@dataclass
class _Record:
    """What the way back needs of one step."""

    index: Tensor | None = None  # of listed terms
    terms: Tensor | None = None
    result: Tensor | None = None
    operands: list[Tensor] | None = None  # of another step, with its graph
    graph: Tensor | None = None


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, *leaves: Tensor) -> tuple[Tensor, ...]:
        slots, records = list(leaves), []
        for group, evidence in zip(steps.groups, steps.evidence, strict=True):
            record = _Record()
            if _is_listed(group, True):
                assert group.lists is not None
                read = [slots[s] for s in group.reads]
                record.index = group.lists.index(evidence, listed.rows(evidence, read), read[0])
                record.terms = listed.picked(group.lists, record.index, read)
                record.result = torch.logsumexp(record.terms, -1)
                slots.append(record.result)
            else:
                with torch.enable_grad():
                    operands = [operand(a, slots).detach().requires_grad_() for a in group.access]
                    record.operands, record.graph = operands, _other(group, operands, steps)
                slots.append(record.graph.detach())
            records.append(record)
        ctx.steps, ctx.records = steps, records
        ctx.shapes = [s.shape for s in slots]
        ctx.save_for_backward(*leaves)
        return tuple(slots[r.slot][:, r.position] for r in steps.results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps: Steps = ctx.steps
        if torch.is_grad_enabled():  # someone wants derivatives of this derivative
            leaves = ctx.saved_tensors
            wanted = [s for s in leaves if s.requires_grad]
            again = plain(steps, leaves)
            found = iter(
                torch.autograd.grad(again, wanted, grads, create_graph=True, allow_unused=True)
            )
            return (None, *(next(found) if s.requires_grad else None for s in leaves))
        way = _WayBack(ctx.shapes)
        for reference, grad in zip(steps.results, grads, strict=True):
            way.put(reference.slot, reference.position, grad)
        first = len(ctx.shapes) - len(steps.groups)
        for number in range(len(steps.groups) - 1, -1, -1):
            if first + number in way.grads:
                own = way.grads.pop(first + number)
                _step_back(steps.groups[number], ctx.records[number], own, way)
        return (None, *(way.grads.get(s) for s in range(first)))


class _WayBack:
    """Gradients of slots, collected from the steps that read them."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        self.grads: dict[int, Tensor] = {}
        self._shapes = shapes

    def add(self, slot: int, grad: Tensor) -> None:
        """A gradient of a whole slot, which is summed over rows where it had one for all."""
        if self._shapes[slot][0] != len(grad):
            grad = grad.sum(0, keepdim=True)
        known = self.grads.get(slot)
        self.grads[slot] = grad if known is None else known + grad

    def put(self, slot: int, places: Any, grad: Tensor) -> None:
        """A gradient of some instances of a slot."""
        if self._shapes[slot][0] != len(grad):
            grad = grad.sum(0, keepdim=True)
        if self._shapes[slot][1] == 1:
            self.add(slot, grad.view(self._shapes[slot]))
            return
        whole = self.grads.get(slot)
        whole = grad.new_zeros(self._shapes[slot]) if whole is None else whole.clone()
        whole[:, places] += grad
        self.grads[slot] = whole


def _step_back(group: Group, record: _Record, grad: Tensor, way: _WayBack) -> None:
    if record.graph is not None:
        assert record.operands is not None
        found = torch.autograd.grad(record.graph, record.operands, grad, retain_graph=True)
        for access, own in zip(group.access, found, strict=True):
            if access.slot is None:
                for number, reference in enumerate(access.references):
                    way.put(reference.slot, reference.position, own[:, number])
            elif access.places is None:
                way.add(access.slot, own)
            else:
                way.put(access.slot, access.places, own)
        return
    assert record.index is not None
    assert record.terms is not None
    assert record.result is not None
    assert group.lists is not None
    share = listed.shares(record.terms, record.result, grad)
    shapes = [way._shapes[s] for s in group.reads]
    for slot, own in zip(
        group.reads, listed.spread(group.lists, record.index, share, shapes), strict=True
    ):
        way.add(slot, own)
