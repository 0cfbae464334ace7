"""The kernels behind ``similarity``; shapes stand beside the arguments."""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRETED

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16


@triton.jit
def candidates_kernel(
    x,  # (n, k) unit rows
    y,  # (m, k) unit rows
    keys,  # (capacity,) int64, row * m + column
    found,  # (1,) int64, how many there are; may exceed the capacity
    n,
    m,
    k,
    capacity,
    limit,  # what a product, or its magnitude, must reach
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
        if first_column + BLOCK_M <= first_row:
            return
    rows = first_row + tl.arange(0, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_M)
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
    if ABSOLUTE:
        acc = tl.abs(acc)
    hits = (acc >= limit) & (rows[:, None] < n) & (columns[None, :] < m)
    if SELF:
        if INCLUDE_SELF:
            hits = hits & (columns[None, :] >= rows[:, None])
        else:
            hits = hits & (columns[None, :] > rows[:, None])
    flat = tl.reshape(hits.to(tl.int32), (BLOCK_N * BLOCK_M,))
    count = tl.sum(flat)
    if count > 0:
        base = tl.atomic_add(found, count.to(tl.int64))
        at = base + (tl.cumsum(flat, 0) - flat).to(tl.int64)
        key = tl.reshape(rows[:, None] * m + columns[None, :], (BLOCK_N * BLOCK_M,))
        tl.store(keys + at, key, mask=(flat != 0) & (at < capacity))
