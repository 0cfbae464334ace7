"""Segments and chains of ``logsemiring``; shapes stand beside the arguments."""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._logsemiring_kernels import INFINITY, inverse, log_of, scaled


@triton.jit
def entries_of(order, at, here, HAS_ORDER: tl.constexpr):
    """Which entries of x the places ``at`` of a sorted list are."""
    if HAS_ORDER:
        return tl.load(order + at, mask=here, other=0)
    return at


@triton.jit
def segment_sums_kernel(
    x,  # (O, n, inner)
    ptr,  # (count + 1,) int64
    order,  # (n,) int64, only read with HAS_ORDER
    scale,  # (O, count, inner), only read with HAS_SCALE
    out,  # (O, count, inner) values, or with WEIGHTS (O, n, inner) probabilities times the scale
    n,
    count,
    inner,
    HAS_ORDER: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A program reduces BLOCK_I columns of one segment, BLOCK_N entries at a time."""
    blocks = tl.cdiv(inner, BLOCK_I)
    program = tl.program_id(0)
    segment = program // blocks
    outer = (segment // count).to(tl.int64)
    segment = (segment % count).to(tl.int64)
    cols = ((program % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    first = tl.load(ptr + segment)
    last = tl.load(ptr + segment + 1)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    column = x + outer * n * inner + cols
    tops = tl.full((BLOCK_N, BLOCK_I), -INFINITY, x.dtype.element_ty)
    for start in range(first, last, BLOCK_N):
        here = start + lanes < last
        entry = entries_of(order, start + lanes, here, HAS_ORDER)
        inside = here[:, None] & (cols < inner)
        terms = tl.load(column + entry[:, None] * inner, mask=inside, other=-INFINITY)
        tops = tl.where(terms > tops, terms, tops)
    top = tl.max(tops, 0)[None, :]
    totals = tl.zeros((BLOCK_N, BLOCK_I), x.dtype.element_ty)
    for start in range(first, last, BLOCK_N):
        here = start + lanes < last
        entry = entries_of(order, start + lanes, here, HAS_ORDER)
        inside = here[:, None] & (cols < inner)
        terms = tl.load(column + entry[:, None] * inner, mask=inside, other=-INFINITY)
        totals += tl.where(inside, scaled(terms, top), 0.0)
    total = tl.sum(totals, 0)[None, :]
    value_at = (outer * count + segment) * inner + cols
    if not WEIGHTS:
        tl.store(out + value_at, log_of(top, total), mask=cols < inner)
    else:
        factor = inverse(top, total)
        if HAS_SCALE:
            factor = factor * tl.load(scale + value_at, mask=cols < inner, other=0.0)
        to = out + outer * n * inner + cols
        for start in range(first, last, BLOCK_N):
            here = start + lanes < last
            entry = entries_of(order, start + lanes, here, HAS_ORDER)
            inside = here[:, None] & (cols < inner)
            terms = tl.load(column + entry[:, None] * inner, mask=inside, other=-INFINITY)
            tl.store(to + entry[:, None] * inner, scaled(terms, top) * factor, mask=inside)


@triton.jit
def step_terms(t, state, rows, cols, k, stride_tr, stride_tc, BLOCK_K: tl.constexpr):
    """state_i + t_ij in double, -inf outside."""
    inside = (rows < k) & (cols < k)
    step = tl.load(t + rows * stride_tr + cols * stride_tc, mask=inside, other=-INFINITY)
    terms = state[:, None] + step.to(tl.float64)
    return tl.where(inside, terms, tl.full((BLOCK_K, BLOCK_K), -INFINITY, tl.float64))


@triton.jit
def largest(terms):
    """The maximum over the rows; NaN is ignored."""
    return tl.max(tl.where(terms != terms, -INFINITY, terms), 0)


@triton.jit
def chain_kernel(
    t,  # (B, length, k, k)
    init,  # (B, rows, k) float64
    states,  # (B, length + 1, rows, k) float64
    length,
    rows,
    k,
    stride_tb,
    stride_tl,
    stride_tr,
    stride_tc,
    BLOCK_K: tl.constexpr,
):
    """A program walks one row of one chain; its state stays in registers."""
    program = tl.program_id(0)
    batch = (program // rows).to(tl.int64)
    row = program % rows
    i = tl.arange(0, BLOCK_K).to(tl.int64)
    state = tl.load(init + (batch * rows + row) * k + i, mask=i < k, other=-INFINITY)
    to = states + (batch * (length + 1) * rows + row) * k + i
    tl.store(to, state, mask=i < k)
    step = t + batch * stride_tb
    for _ in range(length):
        terms = step_terms(step, state, i[:, None], i[None, :], k, stride_tr, stride_tc, BLOCK_K)
        top = largest(terms)
        total = tl.sum(scaled(terms, top[None, :]), 0)
        state = log_of(top, total)
        to += tl.cast(rows, tl.int64) * k
        tl.store(to, state, mask=i < k)
        step += stride_tl


@triton.jit
def chain_gradient_kernel(
    grad,  # (B, length + 1, rows, k) float64
    t,  # (B, length, k, k)
    states,  # (B, length + 1, rows, k) float64
    dt,  # (B, length, k, k) float64
    dinit,  # (B, rows, k) float64
    length,
    rows,
    k,
    stride_tb,
    stride_tl,
    stride_tr,
    stride_tc,
    BLOCK_K: tl.constexpr,
):
    """A program walks one chain backwards, row after row; rows add to dt in order."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_K).to(tl.int64)
    inside = (i[:, None] < k) & (i[None, :] < k)
    for row in range(rows):
        last = ((batch * (length + 1) + length) * rows + row) * k + i
        given = tl.load(grad + last, mask=i < k, other=0.0)
        for back in range(length):
            step = length - 1 - back
            at = ((batch * (length + 1) + step) * rows + row) * k + i
            state = tl.load(states + at, mask=i < k, other=-INFINITY)
            here = t + batch * stride_tb + tl.cast(step, tl.int64) * stride_tl
            terms = step_terms(
                here, state, i[:, None], i[None, :], k, stride_tr, stride_tc, BLOCK_K
            )
            top = largest(terms)
            p = scaled(terms, top[None, :])
            factor = tl.where(given == 0.0, 0.0, given * inverse(top, tl.sum(p, 0)))
            shares = tl.where(factor[None, :] == 0.0, 0.0, p * factor[None, :])
            to = dt + (batch * length + step) * k * k + i[:, None] * k + i[None, :]
            if row > 0:
                tl.store(to, tl.load(to, mask=inside, other=0.0) + shares, mask=inside)
            else:
                tl.store(to, shares, mask=inside)
            spread = tl.sum(tl.where(inside, shares, 0.0), 1)
            given = tl.load(grad + at, mask=i < k, other=0.0) + spread
        tl.store(dinit + (batch * rows + row) * k + i, given, mask=i < k)
