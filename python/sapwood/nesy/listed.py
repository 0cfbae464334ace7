"""The sum over listed entries, as one differentiable step.

What elimination does most: rows look up their list of entries, multiply the weights of each entry
and sum. Done with single ops the overhead of a step of twenty terms would be that of ten calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sapwood.ops.logsemiring import logsumexp

if TYPE_CHECKING:
    from sapwood.nesy.kernels import Kernel


def _index(kernel: Kernel, evidence: Tensor | None, operand: Tensor) -> Tensor:
    """(G, B, operands * terms): where each row finds its terms."""
    if evidence is None:
        return kernel.table.to(operand.device).expand(*operand.shape[:-1], -1)
    rows = kernel.table.to(operand.device).index_select(0, evidence.reshape(-1))
    return rows.view(*evidence.shape, -1)


def _joined(operands: Sequence[Tensor]) -> Tensor:
    """Operands end to end, and one entry of -inf."""
    first = operands[0]
    empty = first.new_full((1, 1, 1), -math.inf).expand(*first.shape[:-1], 1)
    return torch.cat([*operands, empty], -1)


def _multiplied(kernel: Kernel, picked: Tensor, operands: int) -> Tensor:
    """(G, B, kept, width) products of the weights of each entry."""
    lead = picked.shape[:-1]
    if operands > 1:
        picked = picked.view(*lead, operands, -1).sum(-2)
    return picked.view(*lead, kernel.kept_size, kernel.width)


def terms(kernel: Kernel, evidence: Tensor | None, operands: Sequence[Tensor]) -> Tensor:
    """(G, B, kept, width) log weights of all entries, -inf in empty places."""
    picked = _joined(operands).gather(-1, _index(kernel, evidence, operands[0]))
    return _multiplied(kernel, picked, len(operands))


def log_sum(kernel: Kernel, evidence: Tensor | None, operands: Sequence[Tensor]) -> Tensor:
    """(G, B, kept): the log-sum-exp of the terms; gradients of any order, 0 where no mass is."""
    result: Tensor = _LogSum.apply(kernel, evidence, *operands)
    return result


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, evidence: Tensor | None, *operands: Tensor) -> Tensor:
        index = _index(kernel, evidence, operands[0])
        total = _multiplied(kernel, _joined(operands).gather(-1, index), len(operands))
        result = torch.logsumexp(total, -1)
        ctx.kernel, ctx.evidence, ctx.index = kernel, evidence, index
        ctx.save_for_backward(total, result, *operands)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, result, *operands = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants derivatives of this derivative
            again = logsumexp(terms(ctx.kernel, ctx.evidence, operands), -1)
            wanted = [x for x in operands if x.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return (None, None, *(next(found) if x.requires_grad else None for x in operands))
        shift = result.masked_fill(result == -math.inf, 0.0).unsqueeze(-1)
        share = (total - shift).exp_().mul_(grad.unsqueeze(-1))
        share = share.view(*grad.shape[:-1], 1, -1).expand(*grad.shape[:-1], len(operands), -1)
        sizes = [x.shape[-1] for x in operands]
        joined = grad.new_zeros(*grad.shape[:-1], sum(sizes) + 1)
        joined.scatter_add_(-1, ctx.index, share.reshape(*grad.shape[:-1], -1))
        return (None, None, *joined.split([*sizes, 1], -1)[:-1])
