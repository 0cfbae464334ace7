"""The log semiring in plain torch: sums are logsumexp, products are sums, zero is -inf.

Every function has the signature of the op of the same name in ``csrc/schema.cpp``. One policy for
the infinities, in values and in derivatives of any order:

    -inf among finite terms   ignored; its gradient is 0
    all terms -inf, or none   -inf; all gradients are 0
    some term +inf            +inf; the gradient is shared by the +inf terms
    any NaN                   NaN; all gradients are NaN
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.reference._log_circuit import log_circuit, log_circuit_backward
from sapwood.reference._log_sums import logsumexp, softmax

__all__ = [
    "log_circuit",
    "log_circuit_backward",
    "log_matmul",
    "log_matmul_backward",
    "log_matmul_double_backward",
    "log_scan",
    "log_scan_backward",
    "log_scan_path",
    "logsumexp",
    "max_matmul",
    "sample_matmul",
    "segment_logsumexp",
    "segment_logsumexp_backward",
    "segment_logsumexp_double_backward",
    "segment_max",
    "segment_softmax",
    "softmax",
]

_MASK = (1 << 32) - 1


def _terms(a: Tensor, b: Tensor) -> Tensor:  # (B, M, K), (B, K, N) -> (B, M, K, N)
    return a[..., None] + b[:, None]


def log_matmul(a: Tensor, b: Tensor, exact: bool) -> Tensor:  # (B, M, N)
    """c_ij = log sum_k exp(a_ik + b_kj)."""
    return logsumexp(_terms(a, b), 2)


def log_matmul_backward(
    grad: Tensor, a: Tensor, b: Tensor, exact: bool, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """da_ik = sum_j g_ij p_ikj, db_kj = sum_i g_ij p_ikj, with p the softmax over k."""
    weighted = grad[:, :, None] * softmax(_terms(a, b), 2)
    none = grad.new_empty(0)
    return weighted.sum(3) if need_a else none, weighted.sum(1) if need_b else none


def log_matmul_double_backward(
    grad: Tensor, a: Tensor, b: Tensor, tangent_a: Tensor, tangent_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of <tangent_a, da> + <tangent_b, db> in grad, a and b."""
    p, tangent = softmax(_terms(a, b), 2), _terms(tangent_a, tangent_b)
    mean = (p * tangent).sum(2)  # (B, M, N)
    weighted = grad[:, :, None] * p * (tangent - mean[:, :, None])
    return mean, weighted.sum(3), weighted.sum(1)


def max_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """max_k (a_ik + b_kj) and the lowest k that attains it; -1 where that is -inf."""
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    terms = _terms(a.to(wide), b.to(wide))
    if a.shape[2] == 0:
        values = (terms.sum(2) - math.inf).to(a.dtype)
        return values, torch.full_like(values, -1, dtype=torch.long)
    top = terms.amax(2, keepdim=True)
    hit = torch.where(top.isnan(), terms.isnan(), terms == top)
    index = hit.to(torch.uint8).argmax(2)  # the first one
    values = terms.gather(2, index[:, :, None]).squeeze(2)
    return values.to(a.dtype), torch.where(values == -math.inf, -1, index)


def sample_matmul(a: Tensor, b: Tensor, num_samples: int, seed: int) -> Tensor:
    """argmax_k (a_ik + b_kj + Gumbel noise) with Philox noise: an exact draw from the softmax."""
    terms = _terms(a.double(), b.double())
    (batch, m, k), n = a.shape, b.shape[2]
    flat = torch.arange(num_samples * batch, device=a.device).view(num_samples, batch, 1, 1, 1)
    counter = [torch.arange(size, device=a.device) for size in (m, k, n)]
    noise = _gumbel(
        _philox(seed, counter[1][:, None], counter[2], counter[0][:, None, None], flat)
    )  # (S, B, M, K, N)
    if k == 0:
        return torch.full((num_samples, batch, m, n), -1, device=a.device)
    scores = torch.where(terms > -math.inf, terms + noise, -math.inf)
    best, index = scores.max(3)
    return torch.where(best == -math.inf, -1, index)


def _philox(key: int, *counter: Tensor) -> Tensor:
    c0, c1, c2, c3 = (t for t in torch.broadcast_tensors(*counter))
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    bits: Tensor = c0
    return bits


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 64-bit product of 32-bit numbers, in signed 64-bit arithmetic."""
    low, high = (constant & 0xFFFF) * x, (constant >> 16) * x  # 48 bits each
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _gumbel(bits: Tensor) -> Tensor:
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-uniform)).log()


def segment_ids(ptr: Tensor, order: Tensor | None, entries: int) -> Tensor:  # (n,)
    """The segment of every entry."""
    numbers = torch.arange(len(ptr) - 1, device=ptr.device)
    ids = numbers.repeat_interleave(ptr.diff(), output_size=entries)
    return ids if order is None else torch.empty_like(ids).scatter(0, order, ids)


def _split(x: Tensor, ptr: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    sorted_x = x if order is None else x.index_select(1, order)
    parts: tuple[Tensor, ...] = sorted_x.split(ptr.diff().tolist(), 1)
    return parts


def segment_logsumexp(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    """logsumexp over the segments of dimension 1: (O, n, I) -> (O, S, I)."""
    parts = [logsumexp(part, 1) for part in _split(x, ptr, order)]
    return torch.stack(parts, 1) if parts else x.new_empty(x.shape[0], 0, x.shape[2])


def segment_softmax(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    """softmax within the segments of dimension 1: (O, n, I) -> (O, n, I)."""
    parts = [softmax(part, 1) for part in _split(x, ptr, order)]
    if not parts:
        return x.clone()
    p = torch.cat(parts, 1)
    return p if order is None else p.index_select(1, order.argsort())


def segment_logsumexp_backward(
    grad: Tensor, x: Tensor, ptr: Tensor, order: Tensor | None
) -> Tensor:
    """The gradient of x (O, n, I) given that of the values (O, S, I)."""
    ids = segment_ids(ptr, order, x.shape[1])
    return grad.index_select(1, ids) * segment_softmax(x, ptr, order)


def segment_logsumexp_double_backward(
    grad: Tensor, x: Tensor, tangent: Tensor, ptr: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The derivative of <tangent, dx> in grad (O, S, I) and x (O, n, I)."""
    ids = segment_ids(ptr, order, x.shape[1])
    p = segment_softmax(x, ptr, order)
    mean = torch.zeros_like(grad).index_add(1, ids, p * tangent)
    centred = tangent - mean.index_select(1, ids)
    return mean, grad.index_select(1, ids) * p * centred


def segment_max(x: Tensor, ptr: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maxima of segments of dimension 1, and the first entry of x that attains each."""
    values, indices = [], []
    entries = torch.arange(x.shape[1], device=x.device) if order is None else order
    parts = zip(_split(x, ptr, order), entries.split(ptr.diff().tolist()), strict=True)
    for part, numbers in parts:
        if part.shape[1] == 0:
            values.append(x.new_full((x.shape[0], x.shape[2]), -math.inf))
            indices.append(torch.full_like(values[-1], -1, dtype=torch.long))
            continue
        top = part.amax(1, keepdim=True)  # NaN where any term is
        hit = torch.where(top.isnan(), part.isnan(), part == top)
        values.append(top.squeeze(1))
        first = torch.where(hit, numbers[:, None], x.shape[1]).amin(1)
        indices.append(torch.where(values[-1] == -math.inf, -1, first))
    if not values:
        empty = x.new_empty(x.shape[0], 0, x.shape[2])
        return empty, empty.long()
    return torch.stack(values, 1), torch.stack(indices, 1)


def log_scan(t: Tensor, init: Tensor, maximum: bool) -> Tensor:
    """u_0 = init, u_{l+1,j} = log sum_i exp(u_li + t_lij): (B, L + 1, R, k) in float64.

    With ``maximum`` u_{l+1,j} = max_i (u_li + t_lij).
    """
    states = [init.double()]
    for step in t.double().unbind(1):  # (B, k, k)
        u = states[-1]
        states.append(max_matmul(u, step)[0] if maximum else log_matmul(u, step, True))
    return torch.stack(states, 1)


def _max_matmul_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of an output goes to the two entries of the index."""
    index = max_matmul(a, b)[1]  # (B, M, N)
    hit = index[:, :, None] == torch.arange(a.shape[2], device=a.device)[:, None]
    weighted = torch.where(hit, grad[:, :, None], 0.0)  # (B, M, K, N)
    return weighted.sum(3), weighted.sum(1)


def log_scan_backward(
    grad: Tensor, t: Tensor, states: Tensor, maximum: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of t (B, L, k, k) and init (B, R, k) given those of all states."""
    wide, states, grad = t.double(), states.double(), grad.double()
    g = grad[:, -1]
    steps: list[Tensor] = []
    for i in range(t.shape[1] - 1, -1, -1):
        if maximum:
            before, step = _max_matmul_backward(g, states[:, i], wide[:, i])
        else:
            before, step = log_matmul_backward(g, states[:, i], wide[:, i], True, True, True)
        steps.append(step)
        g = grad[:, i] + before
    dt = torch.stack(steps[::-1], 1) if steps else torch.zeros_like(wide)
    return dt.to(t.dtype), g.to(t.dtype)


def log_scan_path(
    t: Tensor, states: Tensor, final: Tensor, num_samples: int, seed: int, maximum: bool
) -> Tensor:
    """Walks back from the end: the best states, or draws from exp of all paths' weights.

    t (B, L, k, k), states (B, L + 1, k), final (B, k) -> (S, B, L + 1), -1 without mass.
    """
    batch, length, k = t.shape[:3]
    chain = torch.arange(batch, device=t.device)
    number = torch.arange(k, device=t.device)
    flat = torch.arange(num_samples * batch, device=t.device).view(num_samples, batch, 1)
    path = [_place(states[:, length].double() + final.double(), seed, length, flat, maximum)]
    for i in range(length - 1, -1, -1):
        column = t[chain[:, None], i, number, path[-1].clamp_min(0)[..., None]]  # (S, B, k)
        place = _place(states[:, i].double() + column.double(), seed, i, flat, maximum)
        path.append(torch.where(path[-1] < 0, -1, place))
    return torch.stack(path[::-1], 2)


def _place(terms: Tensor, seed: int, step: int, flat: Tensor, maximum: bool) -> Tensor:
    """argmax of the terms (..., B, k), or a draw by their exp for each of flat (S, B, 1)."""
    k = terms.shape[-1]
    if k == 0:
        return torch.full_like(flat[..., 0], -1)
    if maximum:
        scores = torch.where(terms.isnan(), math.inf, terms)
        first_nan = terms.isnan().any(-1, keepdim=True)
        scores = torch.where(first_nan & ~terms.isnan(), -math.inf, scores)
    else:
        number = torch.arange(k, device=terms.device)
        zero, at = torch.zeros_like(number), torch.full_like(number, step)
        noise = _gumbel(_philox(seed, number, zero, at, flat))  # (S, B, k)
        scores = torch.where(terms > -math.inf, terms + noise, -math.inf)
    best = scores.amax(-1, keepdim=True)
    index = (scores == best).to(torch.uint8).argmax(-1)  # the first one
    return torch.where(best[..., 0] == -math.inf, -1, index).expand(flat.shape[:-1])
