"""The products behind ``logsemiring``; shapes stand beside the arguments.

A program makes one tile. It multiplies exponentials, asks the certificate of
csrc/logsemiring/kernel.h whether underflow has spoilt the tile, and if so computes the tile again,
term by term.
"""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LARGEST_WEIGHT = tl.constexpr(2.0**110)  # a sum of 2^17 of them is finite


@triton.jit
def scaled(x, top):
    """A term of a sum whose maximum is ``top``: 1 at the maximum, so that +inf counts its terms."""
    empty = top == -INFINITY
    below = tl.exp(x - tl.where(empty, 0.0, top))  # NaN stays NaN
    return tl.where(x == top, tl.where(empty, 0.0, 1.0), below)


@triton.jit
def log_of(top, total):
    infinite = (top == INFINITY) | (top == -INFINITY)
    finite = top + tl.log(tl.where(infinite, 1.0, total))
    return tl.where(total != total, total, tl.where(infinite, top, finite))


@triton.jit
def inverse(top, total):
    """What turns a scaled term into a probability: 0 where no term has mass."""
    empty = (top == -INFINITY) & (total == total)
    return tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))


@triton.jit
def exponentials(pointers, inside, shift):
    """exp(x - shift), and 0 outside."""
    x = tl.load(pointers, mask=inside, other=-INFINITY)
    return tl.where(inside, tl.exp(x - shift), 0.0)


@triton.jit
def product_tile(
    a_rows,  # (BLOCK_M, 1) pointers to the rows of a
    b_cols,  # (1, BLOCK_N) pointers to the columns of b
    rows_inside,  # (BLOCK_M, 1)
    cols_inside,  # (1, BLOCK_N)
    alpha,  # (BLOCK_M, 1) what is subtracted from the rows of a
    beta,  # (1, BLOCK_N)
    k,
    stride_ak,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k exp(a - alpha) exp(b - beta)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K).to(tl.int64)
        in_a = rows_inside & (depth[None, :] < k)
        in_b = cols_inside & (depth[:, None] < k)
        e = exponentials(a_rows + depth[None, :] * stride_ak, in_a, alpha)
        f = exponentials(b_cols + depth[:, None] * stride_bk, in_b, beta)
        acc = tl.dot(e, f, acc, input_precision="ieee")
    return acc


@triton.jit
def exact_tile(
    a_rows,
    b_cols,
    rows_inside,
    cols_inside,
    k,
    stride_ak,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The maximum of each output's own terms, and the sum of the terms scaled by it."""
    top = tl.full((BLOCK_M, BLOCK_N), -INFINITY, tl.float32)
    left_at, right_at = a_rows, b_cols
    for _ in range(k):
        left = tl.load(left_at, mask=rows_inside, other=-INFINITY)
        x = left + tl.load(right_at, mask=cols_inside, other=-INFINITY)
        top = tl.where(x > top, x, top)
        left_at += stride_ak
        right_at += stride_bk
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left_at, right_at = a_rows, b_cols
    for _ in range(k):
        left = tl.load(left_at, mask=rows_inside, other=-INFINITY)
        x = left + tl.load(right_at, mask=cols_inside, other=-INFINITY)
        total += scaled(x, top)
        left_at += stride_ak
        right_at += stride_bk
    return top, total


@triton.jit
def certify(total, alpha, beta, least, inside):
    """Which sums are right, which are 0 as a row or a column is, and whether some are neither."""
    certified = (total >= least) & (total < INFINITY)
    zero = (total == 0.0) & ((alpha == -INFINITY) | (beta == -INFINITY))
    missing = tl.where(inside & ~(certified | zero), 1, 0)
    return certified, zero, tl.max(tl.max(missing, 1), 0)


@triton.jit
def log_product_kernel(
    a,  # (B, m, k)
    b,  # (B, k, n)
    alpha,  # (B, m) maxima of the rows of a; only read without EXACT
    beta,  # (B, n) maxima of the columns of b
    grad,  # (B, m, n), only read with WEIGHTS
    out,  # (B, m, n) values, or with WEIGHTS the grad divided by the sum
    shift,  # (B, m, n) with WEIGHTS: the maximum that the sum is relative to, of open tiles
    open_tiles,  # (B, tiles_m, tiles_n) int32, with WEIGHTS: whether the tile is term by term
    m,
    n,
    k,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_gb,
    stride_gm,
    stride_gn,
    least,  # sums below this have no certificate
    EXACT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    tile = program % tiles
    rows = ((tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = ((tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    rows_inside = rows < m
    cols_inside = cols < n
    inside = rows_inside & cols_inside
    a_rows = a + batch * stride_ab + rows * stride_am
    b_cols = b + batch * stride_bb + cols * stride_bn
    at = (batch * m + rows) * n + cols
    given = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    if WEIGHTS:
        where = grad + batch * stride_gb + rows * stride_gm + cols * stride_gn
        given = tl.load(where, mask=inside, other=0.0)
    is_open = 1
    if not EXACT:
        top_a = tl.load(alpha + batch * m + rows, mask=rows_inside, other=-INFINITY)
        top_b = tl.load(beta + batch * n + cols, mask=cols_inside, other=-INFINITY)
        shift_a = tl.where(top_a == -INFINITY, 0.0, top_a)
        shift_b = tl.where(top_b == -INFINITY, 0.0, top_b)
        total = product_tile(
            a_rows, b_cols, rows_inside, cols_inside, shift_a, shift_b,
            k, stride_ak, stride_bk, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        certified, zero, is_open = certify(total, top_a, top_b, least, inside)
        safe = tl.where(certified, total, 1.0)
        if WEIGHTS:
            result = tl.where(certified, given / safe, 0.0)
            huge = tl.where(inside & (tl.abs(result) > LARGEST_WEIGHT), 1, 0)
            is_open |= tl.max(tl.max(huge, 1), 0)
        else:
            result = tl.where(zero, -INFINITY, top_a + top_b + tl.log(safe))
        if is_open == 0:
            tl.store(out + at, result, mask=inside)
    if WEIGHTS:
        tl.store(open_tiles + batch * tiles + tile, is_open)
    if is_open != 0:
        top, total = exact_tile(
            a_rows, b_cols, rows_inside, cols_inside, k, stride_ak, stride_bk, BLOCK_M, BLOCK_N
        )
        if WEIGHTS:
            tl.store(shift + at, top, mask=inside)
            tl.store(out + at, given * inverse(top, total), mask=inside)
        else:
            tl.store(out + at, log_of(top, total), mask=inside)


@triton.jit
def log_gradient_kernel(
    a,  # (B, m, k)
    b,  # (B, k, n)
    alpha,  # (B, m)
    beta,  # (B, n)
    weight,  # (B, m, n), grad / sum; may be transposed in memory
    shift,  # as weight
    open_tiles,  # (B, tiles_m, tiles_n) likewise
    out,  # (B, m, k), may be transposed in memory
    m,
    n,
    k,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_wm,  # of weight and shift; their batches lie m * n apart
    stride_wn,
    stride_om,  # of out; its batches lie m * k apart
    stride_ok,
    stride_tm,  # of open_tiles
    stride_tn,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out_ik = sum_j weight_ij p_ikj. The gradient of b is that of a with everything transposed."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_k = tl.cdiv(k, BLOCK_K)
    program = tl.program_id(0)
    batch = (program // (tiles_m * tiles_k)).to(tl.int64)
    tile = program % (tiles_m * tiles_k)
    tile_m = (tile // tiles_k).to(tl.int64)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    depth = ((tile % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    rows_inside = rows < m
    depth_inside = depth < k
    inside = rows_inside & depth_inside
    a_at = a + batch * stride_ab + rows * stride_am + depth * stride_ak
    left = tl.load(a_at, mask=inside, other=-INFINITY)
    flags = open_tiles + batch * (tiles_m * tiles_n) + tile_m * stride_tm
    certified = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    exact = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for tile_n in range(tiles_n):
        is_open = 1
        if not EXACT:
            is_open = tl.load(flags + tile_n * stride_tn)
        if is_open != 0:
            first = tl.zeros((1, 1), tl.int64) + tile_n * BLOCK_N
            at = batch * m * n + rows * stride_wm + first * stride_wn
            b_at = b + batch * stride_bb + depth * stride_bk + first * stride_bn
            for _ in range(tl.minimum(n - tile_n * BLOCK_N, BLOCK_N)):
                top = tl.load(shift + at, mask=rows_inside, other=0.0)
                w = tl.load(weight + at, mask=rows_inside, other=0.0)
                x = left + tl.load(b_at, mask=depth_inside, other=-INFINITY)
                exact += w * scaled(x, top)
                at += stride_wn
                b_at += stride_bn
        if not EXACT:  # noqa: SIM102  a constant cannot be joined to a value of the device
            if is_open == 0:
                cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
                top_b = tl.load(beta + batch * n + cols, mask=cols < n, other=-INFINITY)
                shift_b = tl.where(top_b == -INFINITY, 0.0, top_b)[:, None]
                b_at = b + batch * stride_bb + depth * stride_bk + cols[:, None] * stride_bn
                f = exponentials(b_at, (cols[:, None] < n) & depth_inside, shift_b)
                w_at = batch * m * n + rows * stride_wm + cols[None, :] * stride_wn
                w = tl.load(weight + w_at, mask=rows_inside & (cols[None, :] < n), other=0.0)
                certified = tl.dot(w, f, certified, input_precision="ieee")
    if not EXACT:
        top_a = tl.load(alpha + batch * m + rows, mask=rows_inside, other=-INFINITY)
        e = tl.exp(left - tl.where(top_a == -INFINITY, 0.0, top_a))
        exact += tl.where(certified == 0.0, 0.0, e * certified)
    to = out + batch * m * k + rows * stride_om + depth * stride_ok
    tl.store(to, exact, mask=inside)


@triton.jit
def max_product_kernel(
    a,  # (B, m, k)
    b,  # (B, k, n)
    values,  # (B, m, n)
    indices,  # (B, m, n) int64
    m,
    n,
    k,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """NaN wins, then the lowest index."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    tile = program % tiles
    rows = ((tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = ((tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    a_rows = a + batch * stride_ab + rows * stride_am
    b_cols = b + batch * stride_bb + cols * stride_bn
    top = tl.full((BLOCK_M, BLOCK_N), -INFINITY, tl.float32)
    where = tl.full((BLOCK_M, BLOCK_N), -1, tl.int64)
    for step in range(k):
        left = tl.load(a_rows, mask=rows < m, other=-INFINITY)
        x = left + tl.load(b_cols, mask=cols < n, other=-INFINITY)
        better = (x > top) | ((x != x) & (top == top))
        top = tl.where(better, x, top)
        where = tl.where(better, step, where)
        a_rows += stride_ak
        b_cols += stride_bk
    at = (batch * m + rows) * n + cols
    inside = (rows < m) & (cols < n)
    tl.store(values + at, top, mask=inside)
    tl.store(indices + at, where, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def draw_kernel(
    a,  # (B, m, k)
    b,  # (B, k, n)
    out,  # (S, B, m, n) int64
    batches,
    m,
    n,
    k,
    seed,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """argmax_k a + b + Gumbel noise; the random numbers are those of csrc/logsemiring/philox.h."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    program = tl.program_id(0)
    flat = (program // tiles).to(tl.int64)
    batch = flat % batches
    tile = program % tiles
    rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    a_rows = a + batch * stride_ab + rows.to(tl.int64) * stride_am
    b_cols = b + batch * stride_bb + cols.to(tl.int64) * stride_bn
    best = tl.full((BLOCK_M, BLOCK_N), -INFINITY, tl.float64)
    where = tl.full((BLOCK_M, BLOCK_N), -1, tl.int64)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.uint32)
    row, col = zero + rows.to(tl.uint32), zero + cols.to(tl.uint32)
    draw = zero + flat.to(tl.uint32)
    term = zero
    for step in range(k):
        left = tl.load(a_rows, mask=rows < m, other=-INFINITY)
        right = tl.load(b_cols, mask=cols < n, other=-INFINITY)
        x = left.to(tl.float64) + right.to(tl.float64)
        bits, _, _, _ = tl.philox(seed, term, col, row, draw)
        uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        score = x - tl.log(-tl.log(1.0 - uniform))  # 1 - uniform is exact in double
        better = (x > -INFINITY) & (score > best)  # NaN takes no part
        best = tl.where(better, score, best)
        where = tl.where(better, step, where)
        a_rows += stride_ak
        b_cols += stride_bk
        term += 1
    at = (flat * m + rows) * n + cols
    tl.store(out + at, where, mask=(rows < m) & (cols < n))
