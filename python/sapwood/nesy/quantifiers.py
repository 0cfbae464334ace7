"""Quantifiers over a batch of log truths.

"For all" has two published meanings here. ``product`` is the log probability that all rows hold;
``mean_nll``, the training objective, is the log of the geometric mean and no probability that
anything holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import static
from sapwood.nesy.program import Program
from sapwood.ops.logsemiring import log1mexp, logsumexp

_AGGREGATIONS = ("product", "mean_nll", "min", "godel", "pmean", "lukasiewicz")


def _log_truths(op: str, given: Program | Tensor, agg: str, p: float, dim: int) -> Tensor:
    _check.one_of(op, "agg", agg, _AGGREGATIONS)
    log_truths = given.log_truth() if isinstance(given, Program) else given
    _check.tensor(op, "log truths", log_truths)
    if log_truths.dim() == 0:
        log_truths = log_truths.unsqueeze(0)
    if p < 1:
        _check.fail(ValueError, op, "p", "be at least 1", p)
    if agg not in ("product", "lukasiewicz") and log_truths.shape[dim] == 0:
        _check.fail(ValueError, op, "log truths", f"have rows for agg={agg}", "none")
    return log_truths


def forall(
    program_or_log_truths: Program | Tensor, agg: str = "mean_nll", p: float = 2.0, dim: int = 0
) -> Tensor:
    """The log truth of "every row holds".

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> log_truths = torch.tensor([0.5, 0.8]).log()
        >>> nesy.forall(log_truths, "product").exp(), nesy.forall(log_truths, "min").exp()
        (tensor(0.4000), tensor(0.5000))

    Args:
        program_or_log_truths: a program, or log truths with a dimension of rows.
        agg: "product" (all hold, independent rows), "mean_nll" (the geometric mean, for training),
            "min" or "godel", "pmean" (1 minus the p-mean of 1 - t), or "lukasiewicz".
        p: of "pmean", at least 1.
        dim: the rows.

    Returns:
        The log truths without ``dim``.

    Raises:
        ValueError: for an unknown ``agg``, p < 1, or a mean or minimum of no rows.
    """
    t = _log_truths("nesy.forall", program_or_log_truths, agg, p, dim)
    if agg == "product":
        return t.sum(dim)
    if agg == "mean_nll":
        return t.mean(dim)
    if agg in ("min", "godel"):
        return t.amin(dim)
    if agg == "pmean":
        mean = logsumexp(p * log1mexp(t), dim) - math.log(t.shape[dim])
        return log1mexp(mean / p)
    missing = -torch.expm1(t).sum(dim)
    positive = missing < 1
    return torch.where(positive, torch.log1p(-torch.where(positive, missing, 0.0)), -math.inf)


def exists(
    program_or_log_truths: Program | Tensor, agg: str = "product", p: float = 2.0, dim: int = 0
) -> Tensor:
    """The log truth of "some row holds".

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> nesy.exists(torch.tensor([0.5, 0.8]).log(), "product").exp()
        tensor(0.9000)

    Args:
        program_or_log_truths: a program, or log truths with a dimension of rows.
        agg: "product" (some holds, independent rows), "min" or "godel" (the maximum), "pmean" (the
            p-mean of t), or "lukasiewicz".
        p: of "pmean", at least 1.
        dim: the rows.

    Returns:
        The log truths without ``dim``.

    Raises:
        ValueError: for an unknown ``agg`` or "mean_nll", which has no such reading.
    """
    op = "nesy.exists"
    t = _log_truths(op, program_or_log_truths, agg, p, dim)
    if agg == "mean_nll":
        _check.fail(ValueError, op, "agg", "have an existential reading", repr(agg))
    if agg == "product":
        return log1mexp(log1mexp(t).sum(dim))
    if agg in ("min", "godel"):
        return t.amax(dim)
    if agg == "pmean":
        return (logsumexp(p * t, dim) - math.log(t.shape[dim])) / p
    return logsumexp(t, dim).clamp(max=0.0)


def loss(program: Program) -> Tensor:
    """The mean over the batch of the negative log truth: ``-forall(program, "mean_nll")``.

    Example:
        >>> from sapwood import nesy
        >>> nesy.loss(nesy.fmap(lambda v: v, nesy.bernoulli(0.5)))
        tensor(0.6931)
    """
    if program.static:
        found = static.mean_loss(program)
        if found is not None:
            return found
    log_truths = program.log_truth()
    if log_truths.numel() == 0:
        return -forall(log_truths, "mean_nll")  # which says what is wrong
    return -log_truths.mean()
