"""Convolutions and chains in the log semiring."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


_METHODS = ("auto", "sequential", "parallel")
_CHUNK = 32  # steps that the parallel form multiplies as one
_LONG = 128  # steps below which a GPU does not take it
_LONG_ON_CPU = 4096  # and a CPU: measured, one chain of two states, where a step costs 70 ns


def _explain(t: Tensor, *_: Any, semiring: str = "log", **__: Any) -> _backend.Explanation:
    candidates = _backend.candidates(_BACKENDS, t, t, semiring == "max")
    return _backend.Explanation("log_scan", candidates)


class Chain(NamedTuple):
    """Checked arguments of an op over chains."""

    t: Tensor  # (B, L, k, k)
    init: Tensor  # (B, R, k)
    batch: torch.Size

    def states(self, op: str, maximum: bool) -> Tensor:  # (B, L + 1, R, k) float64
        chosen = _backend.choose(op, _BACKENDS, self.t, self.init, maximum)
        found: Tensor = chosen.run(self.t, self.init, maximum)
        return found


def checked(op: str, t: Tensor, init: Tensor | None, *, reverse: bool = False) -> Chain:
    """The chain with one batch dimension; without ``init`` every state starts a row of its own."""
    given = {"t": t} if init is None else {"t": t, "init": init}
    t, *rest = floats(op, **given)
    if t.dim() < 3 or t.shape[-1] != t.shape[-2]:
        _check.fail(ValueError, op, "t", "have shape (..., L, k, k)", tuple(t.shape))
    k, length = t.shape[-1], t.shape[-3]
    batch = t.shape[:-3]
    if rest:
        last = rest[0]
        if last.dim() == 0 or last.shape[-1] != k:
            _check.fail(ValueError, op, "init", f"have a last dimension of {k}", tuple(last.shape))
        if last.shape[:-1] != batch:
            batch = torch.broadcast_shapes(batch, last.shape[:-1])
        start = last.expand(*batch, k).reshape(batch.numel(), 1, k)
    else:
        identity = t.new_full((k, k), -math.inf).fill_diagonal_(0.0)
        start = identity.expand(batch.numel(), k, k)
    chain = t.flip(-3).mT if reverse else t
    if len(batch) != 1 or chain.shape[:1] != batch:
        chain = chain.expand(*batch, length, k, k).reshape(batch.numel(), length, k, k)
    return Chain(chain, start, batch)


def _worth_splitting(chain: Chain) -> bool:
    """Whether long chains leave vector lanes or processors without work.

    Chunks multiply the work by k / R, so on a CPU, which walks eight chains side by side, only a
    single chain of few states gains.
    """
    batch, length, k, _ = chain.t.shape
    if chain.t.device.type == "cpu":
        return batch == 1 and k <= 2 and length >= _LONG_ON_CPU
    if chain.t.device.type != "cuda" or length < _LONG or batch * k == 0:
        return False
    processors = torch.cuda.get_device_properties(chain.t.device).multi_processor_count
    return bool(batch * k < 8 * processors)


def _parallel(chain: Chain, op: str, maximum: bool, every: bool) -> Tensor:
    """The states in chunks: products of chunks, a scan of those, then the steps within each.

    Returns (B, L + 1, R, k), or without ``every`` the first and last state only.
    """
    batch, length, k, _ = chain.t.shape
    rows = chain.init.shape[1]
    whole = length // _CHUNK
    cut = whole * _CHUNK
    chunks = chain.t[:, :cut].reshape(batch * whole, _CHUNK, k, k)
    identity = chunks.new_full((k, k), -math.inf).fill_diagonal_(0.0)
    ones = identity.expand(batch * whole, k, k)
    products = Chain(chunks, ones, chain.batch).states(op, maximum)[:, -1]  # float64
    products = products.view(batch, whole, k, k)
    starts = Chain(products, chain.init.double(), chain.batch).states(op, maximum)
    rest = Chain(chain.t[:, cut:].double(), starts[:, -1], chain.batch).states(op, maximum)
    if not every:
        return torch.stack((starts[:, 0], rest[:, -1]), 1)
    heads = starts[:, :-1].reshape(batch * whole, rows, k)
    inside = Chain(chunks.double(), heads, chain.batch).states(op, maximum)[:, :-1]
    return torch.cat((inside.reshape(batch, cut, rows, k), rest), 1)


@_backend.explainable(_explain)
def log_scan(
    t: Tensor,
    init: Tensor | None = None,
    *,
    return_all: bool = False,
    reverse: bool = False,
    semiring: str = "log",
    method: str = "auto",
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
        semiring: "log", or "max" for the largest term instead of the sum; its gradient goes to the
            first entries that attain the maximum.
        method: "sequential" walks step by step; "parallel" multiplies chunks of 32 steps side by
            side, which is more work and fewer steps in a row; "auto" takes it for few long chains.

    Returns:
        (..., k) with ``init``, else (..., k, k); with ``return_all`` (..., L, k) or (..., L, k, k).
        L = 0 gives ``init``, or the identity (0 on the diagonal, -inf off it).

    Raises:
        ValueError: for matrices that are not square, an ``init`` of another size, an unknown
            ``semiring`` or ``method``.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.
    """
    op = "log_scan"
    _check.one_of(op, "semiring", semiring, ("log", "max"))
    _check.one_of(op, "method", method, _METHODS)
    chain = checked(op, t, init, reverse=reverse)
    k, batch, maximum = chain.t.shape[-1], chain.batch, semiring == "max"
    if method == "parallel" or (method == "auto" and _worth_splitting(chain)):
        states = _parallel(chain, op, maximum, return_all)
    else:
        states = chain.states(op, maximum)
    states = states[:, 1:] if return_all else states[:, -1:]
    if reverse:
        states = states.flip(1)
    states = states.to(chain.t.dtype)
    length = (states.shape[1],) if return_all else ()
    if init is not None:
        return states.reshape(*batch, *length, k)
    states = states.mT if reverse else states
    return states.reshape(*batch, *length, k, k)
