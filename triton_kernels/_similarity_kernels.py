"""The kernels behind ``similarity``; shapes stand beside the arguments."""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRETED

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16


@triton.jit
def _products(
    x,  # (n, k)
    y,  # (m, k)
    rows,  # (BLOCK_N,) int64
    columns,  # (BLOCK_M,) int64
    n,
    m,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of x y^T in float32, (BLOCK_N, BLOCK_M); 0 outside."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside_x = (rows[:, None] < n) & (depth[None, :] < k)
        inside_y = (depth[:, None] < k) & (columns[None, :] < m)
        a = tl.load(x + rows[:, None] * k + depth[None, :], mask=inside_x, other=0.0)
        b = tl.load(y + columns[None, :] * k + depth[:, None], mask=inside_y, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)  # exact
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def candidates_kernel(
    x,  # (n, k) unit rows, of which the first is row `offset` of the problem
    y,  # (m, k) unit rows
    limits,  # (n,) float32: what a product of a row, or its magnitude, must reach
    keys,  # (capacity,) int64, row * m + column
    found,  # (1,) int64, how many there are; may exceed the capacity
    n,
    m,
    k,
    offset,
    capacity,
    SELF: tl.constexpr,  # only columns at or above the row
    INCLUDE_SELF: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    first_row = (program // tiles_m).to(tl.int64) * BLOCK_N
    first_column = (program % tiles_m).to(tl.int64) * BLOCK_M
    if SELF:  # noqa: SIM102  a constant cannot be joined to a value of the device
        if first_column + BLOCK_M <= first_row + offset:
            return
    rows = first_row + tl.arange(0, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_M)
    acc = _products(x, y, rows, columns, n, m, k, BLOCK_N, BLOCK_M, BLOCK_K)
    if ABSOLUTE:
        acc = tl.abs(acc)
    limit = tl.load(limits + rows, mask=rows < n, other=float("inf"))
    hits = (acc >= limit[:, None]) & (rows[:, None] < n) & (columns[None, :] < m)
    places = rows + offset
    if SELF:
        if INCLUDE_SELF:
            hits = hits & (columns[None, :] >= places[:, None])
        else:
            hits = hits & (columns[None, :] > places[:, None])
    flat = tl.reshape(hits.to(tl.int32), (BLOCK_N * BLOCK_M,))
    count = tl.sum(flat)
    if count > 0:
        base = tl.atomic_add(found, count.to(tl.int64))
        at = base + (tl.cumsum(flat, 0) - flat).to(tl.int64)
        key = tl.reshape(places[:, None] * m + columns[None, :], (BLOCK_N * BLOCK_M,))
        tl.store(keys + at, key, mask=(flat != 0) & (at < capacity))


@triton.jit
def maxima_kernel(
    x,  # (n, k) unit rows, of which the first is row `offset` of the problem
    y,  # (m, k) unit rows
    maxima,  # (n, groups) float32: the best product of a row in each group of columns
    n,
    m,
    k,
    offset,
    groups,  # of BLOCK_M / PARTS columns each
    WITHOUT_SELF: tl.constexpr,  # column i is no candidate of row i
    ABSOLUTE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    tile = (program % tiles_m).to(tl.int64)
    rows = (program // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = _products(x, y, rows, columns, n, m, k, BLOCK_N, BLOCK_M, BLOCK_K)
    if ABSOLUTE:
        acc = tl.abs(acc)
    candidate = columns[None, :] < m
    if WITHOUT_SELF:
        candidate = candidate & (columns[None, :] != rows[:, None] + offset)
    acc = tl.where(candidate, acc, float("-inf"))
    best = tl.max(tl.reshape(acc, (BLOCK_N, PARTS, BLOCK_M // PARTS)), 2)
    group = tile * PARTS + tl.arange(0, PARTS)
    inside = (rows[:, None] < n) & (group[None, :] < groups)
    tl.store(maxima + rows[:, None] * groups + group[None, :], best, mask=inside)


@triton.jit
def join_kernel(
    parent,  # (n,) int32, a forest in which a parent is smaller than its children
    rows,  # (count,) int32
    columns,  # (count,) int32
    count,
    BLOCK_E: tl.constexpr,
):
    """Joins the sets of the two ends of every edge; the smallest member ends as the root."""
    edges = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    active = edges < count
    a = tl.load(rows + edges, mask=active, other=0)
    b = tl.load(columns + edges, mask=active, other=0)
    while tl.max(active.to(tl.int32)) > 0:
        a = _roots(parent, a, active)
        b = _roots(parent, b, active)
        active = active & (a != b)
        low = tl.minimum(a, b)
        high = tl.maximum(a, b)
        # If another edge gave `high` a parent meanwhile, that one and `low` are left to be joined.
        before = tl.atomic_min(parent + high, low, mask=active)
        active = active & (before != high)
        a = tl.where(active, before, 0)
        b = low


@triton.jit
def _roots(parent, of, active):
    """(BLOCK_E,) roots of the active members of a forest that other programs change meanwhile."""
    up = tl.load(parent + of, mask=active, other=0, volatile=True)
    while tl.max((active & (up != of)).to(tl.int32)) > 0:
        of = tl.where(active, up, of)
        up = tl.load(parent + of, mask=active, other=0, volatile=True)
    return of
