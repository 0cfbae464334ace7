"""Convolutions and chains in the log semiring."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.logsemiring import _sequence_specs, _triton
from sapwood.ops.logsemiring._matmul import floats, log_matmul
from sapwood.reference import logsemiring as reference

_BACKENDS = (
    _backend.native("log_scan", _sequence_specs.log_scan),
    _triton.backend("log_scan"),
    _backend.Backend("reference", lambda *_: None, reference.log_scan),
)


def log_conv(a: Tensor, b: Tensor) -> Tensor:
    """Full convolution in the log semiring: ``log sum_i exp(a[i] + b[t - i])``.

    Example::

        two = torch.tensor([0.25, 0.5, 0.25]).log()   # the distribution of two coins' sum
        four = sapwood.ops.log_conv(two, two)         # of four coins: (5,)

    Every output has a maximum of its own, so that tails hundreds of nats below the peak are right;
    a convolution by FFT loses everything below 1e-7 of the peak.

    Args:
        a: (..., n) floating point, n >= 1.
        b: (..., m), m >= 1; leading dimensions broadcast.

    Returns:
        (..., n + m - 1).

    Raises:
        ValueError: for an operand without entries.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.
    """
    a, b = floats("log_conv", a=a, b=b)
    for name, value in (("a", a), ("b", b)):
        if value.dim() == 0 or value.shape[-1] == 0:
            shape = tuple(value.shape)
            _check.fail(ValueError, "log_conv", name, "have a last dimension of at least 1", shape)
    if a.shape[-1] > b.shape[-1]:
        a, b = b, a
    n = a.shape[-1]
    windows = F.pad(b, (n - 1, n - 1), value=-math.inf).unfold(-1, n, 1)  # (..., n + m - 1, n)
    product = log_matmul(a.flip(-1).unsqueeze(-2), windows.mT, method="exact")
    return product.squeeze(-2)


def _explain(t: Tensor, *_: Any, **__: Any) -> _backend.Explanation:
    return _backend.Explanation("log_scan", _backend.candidates(_BACKENDS, t))


@_backend.explainable(_explain)
def log_scan(
    t: Tensor, init: Tensor | None = None, *, return_all: bool = False, reverse: bool = False
) -> Tensor:
    """Product of a chain of matrices in the log semiring, or all of its prefixes.

    Example::

        steps = torch.log_softmax(torch.randn(32, 100, 4, 4), -1)   # (B, L, k, k)
        start = torch.log_softmax(torch.randn(32, 4), -1)
        alpha = sapwood.ops.log_scan(steps, start)                  # (B, k): the forward algorithm

    The state is float64 whatever the input, so that chains of many thousands of factors do not
    drift; the result is rounded once at the end.

    Args:
        t: (..., L, k, k) floating point; t[..., l, i, j] leads from state i to state j.
        init: (..., k) to multiply from the left (with ``reverse`` from the right), or None for the
            product of the matrices themselves.
        return_all: every prefix, in order, instead of the whole product.
        reverse: suffix products t[l] ... t[L - 1] instead of prefixes t[0] ... t[l].

    Returns:
        (..., k) with ``init``, else (..., k, k); with ``return_all`` (..., L, k) or (..., L, k, k).
        L = 0 gives ``init``, or the identity (0 on the diagonal, -inf off it).

    Raises:
        ValueError: for matrices that are not square and an ``init`` of another size.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.
    """
    op = "log_scan"
    given = {"t": t} if init is None else {"t": t, "init": init}
    t, *rest = floats(op, **given)
    if t.dim() < 3 or t.shape[-1] != t.shape[-2]:
        _check.fail(ValueError, op, "t", "have shape (..., L, k, k)", tuple(t.shape))
    k, length = t.shape[-1], t.shape[-3]
    batch = t.shape[:-3]
    if rest:
        if rest[0].dim() == 0 or rest[0].shape[-1] != k:
            _check.fail(ValueError, op, "init", f"have a last dimension of {k}", rest[0].shape)
        batch = torch.broadcast_shapes(batch, rest[0].shape[:-1])
        start = rest[0].expand(*batch, k).reshape(batch.numel(), 1, k)
    else:
        identity = t.new_full((k, k), -math.inf).fill_diagonal_(0.0)
        start = identity.expand(batch.numel(), k, k)
    chain = t.flip(-3).mT if reverse else t
    chain = chain.expand(*batch, length, k, k).reshape(batch.numel(), length, k, k)
    run = _backend.choose(op, _BACKENDS, chain).run
    states: Tensor = run(chain, start)  # (B, L + 1, R, k)
    states = states[:, 1:] if return_all else states[:, -1:]
    if reverse:
        states = states.flip(1)
    states = states.to(t.dtype)
    if rest:
        return states.reshape(*batch, -1, k) if return_all else states.reshape(*batch, k)
    states = states.mT if reverse else states
    return states.reshape(*batch, -1, k, k) if return_all else states.reshape(*batch, k, k)
