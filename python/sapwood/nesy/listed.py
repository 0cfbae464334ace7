"""The sum over listed entries, as one differentiable step.

What elimination does most: rows look up their list of entries, multiply the weights of each entry
and sum. Done with single ops the overhead of a step of twenty terms would be that of ten calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapwood.nesy.supports import Indices
from sapwood.ops.logsemiring import logsumexp


class Lists:
    """The entries of all instances of a step, as places in the slots that it reads.

    Args:
        table: (E, operands, terms) places in each operand, -1 for none.
        offsets: per instance and operand, where it begins in the slots laid end to end.
        total: entries of these slots per row of the batch.
        kept_size: results of an instance; a list of the same length belongs to each.
    """

    def __init__(
        self, table: Indices, offsets: Sequence[Sequence[int]], total: int, kept_size: int
    ) -> None:
        begin = np.asarray(offsets, dtype=np.int64)[:, None, :, None]  # (G, 1, operands, 1)
        places = np.where(table < 0, total, table + begin)  # (G, E, operands, terms)
        self.instances, self.evidence, self.operands, terms = places.shape
        self.shape = (self.instances, self.operands, kept_size, terms // kept_size)
        self.places = torch.from_numpy(places.reshape(self.instances * self.evidence, -1))

    def index(self, evidence: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """(B, G * operands * terms): where each row finds its terms."""
        if self.places.device != device:
            self.places = self.places.to(device)
        if evidence is None:
            return self.places.view(1, -1).expand(rows, -1)
        if self.instances > 1:
            first = torch.arange(0, len(self.places), self.evidence, device=device)
            evidence = evidence + first.unsqueeze(1)
        return self.places.index_select(0, evidence.T.reshape(-1)).view(rows, -1)


def _rows(evidence: Tensor | None, slots: Sequence[Tensor]) -> int:
    return max(len(s) for s in slots) if evidence is None else evidence.shape[1]


def _terms(lists: Lists, index: Tensor, slots: Sequence[Tensor]) -> Tensor:
    """(B, G, kept, width) log weights of all entries, -inf in empty places."""
    rows, first = len(index), slots[0]
    flat = [s.expand(rows, -1, -1).reshape(rows, -1) for s in slots]
    flat.append(first.new_full((1, 1), -math.inf).expand(rows, 1))
    picked = torch.cat(flat, 1).gather(1, index).view(rows, *lists.shape)
    return picked.squeeze(2) if lists.operands == 1 else picked.sum(2)


def terms(lists: Lists, evidence: Tensor | None, slots: Sequence[Tensor]) -> Tensor:
    """(B, G, kept, width): the log weights of all entries, for sums of other kinds."""
    index = lists.index(evidence, _rows(evidence, slots), slots[0].device)
    return _terms(lists, index, slots)


def log_sum(lists: Lists, evidence: Tensor | None, slots: Sequence[Tensor]) -> Tensor:
    """(B, G, kept): the log-sum-exp of the terms; gradients of any order, 0 where no mass is.

    Args:
        lists: the entries.
        evidence: (G, B) int64 rows of the tables, if there is evidence that differs by row.
        slots: (B or 1, n, size) each.
    """
    result: Tensor = _LogSum.apply(lists, evidence, *slots)  # type: ignore[no-untyped-call]
    return result


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lists: Lists, evidence: Tensor | None, *slots: Tensor) -> Tensor:
        index = lists.index(evidence, _rows(evidence, slots), slots[0].device)
        total = _terms(lists, index, slots)
        result = torch.logsumexp(total, -1)
        ctx.lists, ctx.index = lists, index
        ctx.save_for_backward(total, result, *slots)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, result, *slots = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants derivatives of this derivative
            again = logsumexp(_terms(ctx.lists, ctx.index, slots), -1)
            wanted = [s for s in slots if s.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return (None, None, *(next(found) if s.requires_grad else None for s in slots))
        shift = result.masked_fill(result == -math.inf, 0.0).unsqueeze(-1)
        share = (total - shift).exp_().mul_(grad.unsqueeze(-1))
        rows, operands = len(share), ctx.lists.operands
        if operands > 1:
            share = share.unsqueeze(2).expand(rows, *ctx.lists.shape)
        sizes = [s.shape[1] * s.shape[2] for s in slots]
        joined = grad.new_zeros(rows, sum(sizes) + 1)
        joined.scatter_add_(1, ctx.index, share.reshape(rows, -1))
        parts = joined.split([*sizes, 1], 1)
        grads = (p.view(rows, *s.shape[1:]) for p, s in zip(parts, slots, strict=False))
        return (
            None, None,
            *(g if len(s) == rows else g.sum(0, keepdim=True)
              for g, s in zip(grads, slots, strict=True)),
        )  # fmt: skip
