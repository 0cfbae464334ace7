"""All steps of a plan as one differentiable function.

A truth is a dozen small tensors. Through autograd each step would cost a node, a call from the
engine back into Python and the gradients of every slice; here one node fills a workspace stage by
stage and walks it backwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood._register import callable_for
from sapwood.nesy import chain
from sapwood.nesy.chain import Steps, operand, slot_of
from sapwood.nesy.plan import Reference
from sapwood.nesy.stages import ONE, Region, Stage

# The public function checks its arguments, which costs as much as the op.
_sums = callable_for("segment_logsumexp")
_shares = callable_for("segment_logsumexp_backward")
_states = callable_for("log_scan")
_states_back = callable_for("log_scan_backward")

#: Longer chains are left to ``log_scan``, which may split them.
_LONG = 128


def run(steps: Steps, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results with the log-sum-exp: (B,) each, or (B, kept) where the plan keeps values.

    Args:
        steps: what to run.
        leaves: per slot the weights of its n leaves one after the other, (n * (B or 1), ...).
    """
    if not steps.results:
        return []
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return list(_Run.apply(steps, *leaves))  # type: ignore[no-untyped-call]
    return _Walk(steps, leaves).there(leaves, record=False)


class _Stage(NamedTuple):
    """What became of a stage."""

    places: Sequence[Tensor]  # per operand (B, J * width) columns that were read
    terms: Tensor  # (B, J * width, 1)
    results: Tensor  # (B, J, 1)


class _Other(NamedTuple):
    """What the way back needs of a step with an op of its own."""

    operands: list[Tensor]
    result: Tensor  # with its graph

    def back(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the operands."""
        if len(self.result) != len(grad):  # one row for all
            grad = grad.sum(0, keepdim=True)
        return torch.autograd.grad(self.result, self.operands, grad, retain_graph=True)


class _Scan(NamedTuple):
    """What the way back needs of a chain of matrices."""

    matrices: Tensor  # (B, n, k, k)
    states: Tensor  # (B, n + 1, 1, k) float64

    def back(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the vector and the matrices."""
        grads = torch.zeros_like(self.states)
        grads[:, -1] = grad
        own, vector = _states_back(grads, self.matrices, self.states, False)
        return vector.to(own.dtype), own.flatten(2)


class _Walk:
    """One way through the workspace, and back."""

    def __init__(self, steps: Steps, leaves: Sequence[Tensor]) -> None:
        self._steps = steps
        self._layout = steps.plan.layout.on(leaves[0].device)
        self._counts = [max(1, len(numbers)) for numbers in steps.plan.slots]
        self._shapes = [x.shape for x in leaves]
        self._dtypes = [x.dtype for x in leaves]
        self._dtype = torch.float32  # of the workspace, known when it is filled
        self._normalised: dict[int, Tensor] = {}
        self._stages: dict[int, _Stage] = {}
        self._others: dict[int, _Other | _Scan] = {}

    def there(self, leaves: Sequence[Tensor], *, record: bool) -> list[Tensor]:
        """Fills the workspace in the order of the plan."""
        steps, layout = self._steps, self._layout
        leaves = list(leaves)
        for slot in steps.logits:
            leaves[slot] = self._normalised[slot] = torch.log_softmax(leaves[slot], -1)
        self._dtype = leaves[0].dtype  # that of the logarithms, which autocast may widen
        for other in leaves[1:]:
            self._dtype = torch.promote_types(self._dtype, other.dtype)
        work = leaves[0].new_full((steps.rows, layout.width), -math.inf, dtype=self._dtype)
        if layout.uses_one:
            work.select(1, ONE).fill_(0)
        for weights, region in zip(leaves, layout.regions, strict=False):
            if region is not None:
                rows = weights.shape[0] // region.count
                region.by_leaf(work).copy_(weights.reshape(region.count, rows, region.size))
        seen = None if layout.lookups is None else layout.lookups.read(steps.columns)
        for step in layout.steps:
            if isinstance(step, Stage):
                self._stages[step.begin] = _fill(step, work, seen)
            else:
                self._run_other(step, work, leaves, record)
        return [self._result(work, reference) for reference in steps.results]

    def _run_other(self, number: int, work: Tensor, leaves: Sequence[Tensor], record: bool) -> None:
        group = self._steps.plan.groups[number]

        def slot(number: int) -> Tensor:
            region = self._layout.regions[number]
            if region is not None:
                return region.of(work)
            return slot_of(leaves[number], self._counts[number])

        operands = [operand(access, slot).to(self._dtype) for access in group.access]
        into = self._region(self._slot(number)).of(work)
        if group.kernel is None and operands[1].shape[1] < _LONG:
            rows, k = len(into), into.shape[-1]
            vector, matrices = (x.expand(rows, -1, -1) for x in operands)
            matrices = matrices.unflatten(-1, (k, k))
            states = _states(matrices, vector, False)
            self._others[number] = _Scan(matrices, states)
            into.copy_(states[:, -1])
            return
        with torch.set_grad_enabled(record):
            if record:  # a copy: the workspace goes on changing
                operands = [x.clone().requires_grad_() for x in operands]
            result = chain.other(group, operands, self._steps.reduce, True)
        self._others[number] = _Other(operands, result)
        into.copy_(result.detach())

    def _slot(self, group: int) -> int:
        return len(self._shapes) + group

    def _region(self, slot: int) -> Region:
        region = self._layout.regions[slot]
        assert region is not None
        return region

    def _result(self, work: Tensor, reference: Reference) -> Tensor:
        slot = reference.slot
        region, stage = self._region(slot), self._layout.stage_of.get(slot)
        begin, source = region.begin + reference.position * region.size, work
        if stage is not None:
            begin, source = begin - stage.begin, self._stages[stage.begin].results
        if self._steps.plan.support is None:
            return source.select(1, begin).view(-1) if stage else source.select(1, begin).clone()
        return source.narrow(1, begin, region.size).reshape(-1, region.size).clone()

    def back(self, grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the leaves, given those of the results."""
        layout = self._layout
        work = grads[0].new_zeros((self._steps.rows, layout.width), dtype=self._dtype)
        alone = self._alone()
        if alone is None:
            for reference, grad in zip(self._steps.results, grads, strict=True):
                region = self._region(reference.slot)
                begin = region.begin + reference.position * region.size
                own = work.narrow(1, begin, region.size)
                own += grad.reshape(own.shape)
        direct: dict[int, Tensor] = {}  # of leaves outside the workspace
        for step in reversed(layout.steps):
            if isinstance(step, Stage):
                own = grads[0] if step is alone else work.narrow(1, step.begin, step.outputs)
                own = own.reshape(work.shape[0], step.outputs, 1)
                _spread(step, self._stages[step.begin], own, work)
            else:
                self._other_back(step, work, direct)
        return [self._leaf(slot, work, direct) if w else None for slot, w in enumerate(wanted)]

    def _alone(self) -> Stage | None:
        """The stage that computes the only result and nothing else, if there is one."""
        results = self._steps.results
        stage = self._layout.stage_of.get(results[0].slot) if len(results) == 1 else None
        if stage is None or stage.read or stage.outputs != self._region(results[0].slot).size:
            return None
        return stage

    def _other_back(self, number: int, work: Tensor, direct: dict[int, Tensor]) -> None:
        done = self._others[number]
        own = self._region(self._slot(number)).of(work)
        found = done.back(own)
        for access, grad in zip(self._steps.plan.groups[number].access, found, strict=True):
            if access.slot is not None:
                places = slice(None) if access.places is None else access.places
                self._add(access.slot, places, grad, work, direct)
                continue
            for position, reference in enumerate(access.references):
                grads = grad[:, position]
                self._add(reference.slot, reference.position, grads, work, direct)

    def _add(
        self, slot: int, places: Any, grad: Tensor, work: Tensor, direct: dict[int, Tensor]
    ) -> None:
        region = self._layout.regions[slot]
        if region is not None:
            region.of(work)[:, places] += grad
            return
        count, shape = self._counts[slot], self._shapes[slot]
        rows = shape[0] // count
        if slot not in direct:
            direct[slot] = work.new_zeros((rows, count, math.prod(shape[1:])))
        direct[slot][:, places] += grad if len(grad) == rows else grad.sum(0)

    def _leaf(self, slot: int, work: Tensor, direct: dict[int, Tensor]) -> Tensor | None:
        region, shape = self._layout.regions[slot], self._shapes[slot]
        if region is None and slot not in direct:
            return None
        if region is None:
            grad = direct[slot].transpose(0, 1)
        else:
            grad = region.by_leaf(work)
            if shape[0] == self._counts[slot] and work.shape[0] != 1:  # one row for all
                grad = grad.sum(1, keepdim=True)
        if slot in self._steps.logits:
            known = self._normalised[slot].view(grad.shape)
            grad = grad.to(known.dtype)
            grad = torch._log_softmax_backward_data(grad, known, -1, known.dtype)
        return grad.reshape(shape).to(self._dtypes[slot])


def _fill(stage: Stage, work: Tensor, evidence: Tensor | None) -> _Stage:
    """Writes the log-sum-exps of a stage."""
    index = stage.index(evidence, work.shape[0]).unbind()
    terms = work.gather(1, index[0])
    for other in index[1:]:
        terms += work.gather(1, other)
    terms = terms.unsqueeze(-1)
    results = _sums(terms, stage.segments, None)
    if stage.read:
        work.narrow(1, stage.begin, stage.outputs).copy_(results.squeeze(-1))
    return _Stage(index, terms, results)


def _spread(stage: Stage, done: _Stage, own: Tensor, work: Tensor) -> None:
    """Adds what each term contributes to the gradients of the columns it was read from."""
    share = _shares(own, done.terms, stage.segments, None).squeeze(-1)
    for places in done.places:
        work.scatter_add_(1, places, share)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.steps, ctx.walk = steps, _Walk(steps, leaves)
        ctx.save_for_backward(*leaves)
        return tuple(ctx.walk.there(leaves, record=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, *ctx.walk.back(grads, ctx.needs_input_grad[1:])
        leaves = ctx.saved_tensors  # someone wants derivatives of this derivative
        wanted = [x for x in leaves if x.requires_grad]
        again = plain(ctx.steps, leaves)
        found = iter(
            torch.autograd.grad(again, wanted, grads, create_graph=True, allow_unused=True)
        )
        return None, *(next(found) if x.requires_grad else None for x in leaves)


def plain(steps: Steps, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The same as :func:`run` step by step, with derivatives of any order."""
    counts = [max(1, len(numbers)) for numbers in steps.plan.slots]
    weights = [
        torch.log_softmax(x, -1) if slot in steps.logits else x for slot, x in enumerate(leaves)
    ]
    results = chain.plain(steps, list(map(slot_of, weights, counts)), fast=True)
    rows = [x.expand(steps.rows, -1) for x in results]
    return rows if steps.plan.support is not None else [x.squeeze(-1) for x in rows]
