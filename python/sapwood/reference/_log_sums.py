"""The sum of the log semiring and its gradient, with the policy of ``reference/logsemiring.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """log sum exp(x) over one dimension, with the policy above."""
    if x.shape[dim] == 0:
        return x.sum(dim) - math.inf
    top = x.detach().amax(dim, keepdim=True)  # NaN where any term is
    infinite = top == math.inf
    shift = torch.where(top.isfinite(), top, 0.0)
    total = torch.where(infinite, 0.0, x - shift).exp().sum(dim, keepdim=True)
    empty = total == 0
    finite = torch.where(empty, -math.inf, torch.where(empty, 1.0, total).log() + shift)
    share = x == math.inf
    shared = torch.where(share, x, 0.0).sum(dim, keepdim=True) / share.sum(dim, keepdim=True)
    return torch.where(infinite, shared, finite).squeeze(dim)


def softmax(x: Tensor, dim: int) -> Tensor:
    """exp(x) / sum exp(x), with the policy above: the gradient of :func:`logsumexp`."""
    if x.shape[dim] == 0:
        return x * 0.0
    total = logsumexp(x, dim).unsqueeze(dim)
    finite = total.isfinite() | total.isnan()
    weights = torch.where(finite, x - torch.where(finite, total, 0.0), -math.inf).exp()
    share = (x == math.inf).to(x.dtype)
    return torch.where(total == math.inf, share / share.sum(dim, keepdim=True), weights)
