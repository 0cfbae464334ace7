"""The kernels behind ``masked_matmul``; shapes stand beside the arguments.

W is the left operand of every ``tl.dot``, because it is computed in registers, and only the left
operand of a tensor-core product may stay there. Offsets into tensors are 64-bit.
"""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRETED

WORD = tl.constexpr(16)  # columns per word of the bitmap
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16


@triton.jit
def _popcount(bits):
    # The sequence that LLVM recognises: one popc instruction on the device.
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2u)), u = sqrt(2/pi) (y + 0.044715 y^3)
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return y


@triton.jit
def _tile_of(program, tiles_n, tiles_b, GROUP: tl.constexpr):
    # GROUP row tiles x all batch tiles run side by side, so that both operands stay in L2.
    group = program // (GROUP * tiles_b)
    first = group * GROUP
    size = min(tiles_n - first, GROUP)
    inside = program % (GROUP * tiles_b)
    return first + inside % size, inside // size


@triton.jit
def _load_words(words, rows, n, columns, end, words_per_row):
    # (rows, columns) words of the bitmap, 0 from row n and from column `end` on
    inside = (rows[:, None] < n) & (columns[None, :] < end)
    word = tl.load(words + rows[:, None] * words_per_row + columns[None, :], mask=inside, other=0)
    return word.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _load_x(x, positions, k, batch, size, stride_xb, stride_xk):
    # x at k = positions and batch = batch, broadcast against each other; 0 outside
    inside = (positions < k) & (batch < size)
    return tl.load(x + batch * stride_xb + positions * stride_xk, mask=inside, other=0.0)


@triton.jit
def _dot(w, xs, acc):
    if UPCAST:
        w = w.to(tl.float32)  # exact
        xs = xs.to(tl.float32)
    return tl.dot(w, xs, acc, input_precision="ieee")


@triton.jit
def _store(out, acc, bias, rows, n, batch, size, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    # acc (rows, batch) -> out (size, n) contiguous
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    y = _activate(acc, ACTIVATION)
    inside = (rows[:, None] < n) & (batch[None, :] < size)
    tl.store(out + batch[None, :] * n + rows[:, None], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def packed_linear_kernel(
    x,  # (size, k), strides given
    values,  # (nnz,)
    words,  # (n, words_per_row) int16
    row_ptr,  # (n + 1,) int64
    bias,  # (n,), read when HAS_BIAS
    out,  # (size, n), or with SPLIT the float32 partial sums (splits, size, n)
    size,
    n,
    k,
    words_per_row,
    columns_per_split,
    stride_xb,
    stride_xk,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, tile_b = _tile_of(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(size, BLOCK_B), 8)
    rows = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1).to(tl.int64)
    first = split * columns_per_split
    last = min(first + columns_per_split, k)

    BLOCK_W: tl.constexpr = BLOCK_K // WORD
    column = tl.arange(0, BLOCK_W)
    bit = tl.arange(0, WORD).to(tl.uint32)
    below = (tl.full((WORD,), 1, tl.uint32) << bit) - 1
    base = tl.load(row_ptr + rows, mask=rows < n, other=0)  # (BLOCK_N,) next value of each row
    if SPLIT:  # skip the values of the columns before `first`
        for start in range(0, first // WORD, 4 * BLOCK_W):
            before = start + tl.arange(0, 4 * BLOCK_W)
            word = _load_words(words, rows, n, before, first // WORD, words_per_row)
            base += tl.sum(_popcount(word), axis=1)

    if BLOCK_B == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_W, WORD), tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for start in range(first, last, BLOCK_K):
        word = _load_words(words, rows, n, column + start // WORD, words_per_row, words_per_row)
        count = _popcount(word)  # (BLOCK_N, BLOCK_W)
        rank = tl.cumsum(count, axis=1) - count
        at = base[:, None, None] + rank[:, :, None] + _popcount(word[:, :, None] & below)
        present = ((word[:, :, None] >> bit) & 1) != 0  # (BLOCK_N, BLOCK_W, WORD)
        w = tl.load(values + at, mask=present, other=0.0)
        base += tl.sum(count, axis=1)
        if BLOCK_B == 1:
            positions = start + column[:, None] * WORD + tl.arange(0, WORD)[None, :]
            xs = _load_x(x, positions, k, batch[None, :], size, stride_xb, stride_xk)
            acc = tl.fma(w.to(tl.float32), tl.broadcast_to(xs[None].to(tl.float32), w.shape), acc)
        else:
            positions = start + tl.arange(0, BLOCK_K)[:, None]
            xs = _load_x(x, positions, k, batch[None, :], size, stride_xb, stride_xk)
            w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(xs.dtype)
            acc = _dot(w, xs, acc)
    if BLOCK_B == 1:
        acc = tl.sum(tl.reshape(acc, (BLOCK_N, BLOCK_K)), axis=1)[:, None]
    if SPLIT:
        _store(out + split * size * n, acc, bias, rows, n, batch, size, False, "none")
    else:
        _store(out, acc, bias, rows, n, batch, size, HAS_BIAS, ACTIVATION)


@triton.jit
def sum_splits_kernel(
    partial,  # (splits, total) float32
    bias,  # (n,)
    out,  # (total,), total = size * n
    total,
    n,
    splits,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    source = partial + at
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(source, mask=inside, other=0.0)
        source += total
    if HAS_BIAS:
        acc += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, _activate(acc, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit
def masked_matmul_kernel(
    x,  # (size, k)
    weight,  # (n, k)
    mask,  # (n, k) uint8
    bias,  # (n,), read when HAS_BIAS
    out,  # (size, n) contiguous
    size,
    n,
    k,
    stride_xb,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_mn,
    stride_mk,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, tile_b = _tile_of(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(size, BLOCK_B), 8)
    rows = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = rows[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for start in range(0, k, BLOCK_K):
        positions = start + tl.arange(0, BLOCK_K).to(tl.int64)
        col = positions[None, :]
        inside = (row < n) & (col < k)
        w = tl.load(weight + row * stride_wn + col * stride_wk, mask=inside, other=0.0)
        keep = tl.load(mask + row * stride_mn + col * stride_mk, mask=inside, other=0) != 0
        w = tl.where(keep, w, 0.0)
        xs = _load_x(x, positions[:, None], k, batch[None, :], size, stride_xb, stride_xk)
        acc = _dot(w, xs, acc)
    _store(out, acc, bias, rows, n, batch, size, HAS_BIAS, "none")


@triton.jit
def sampled_matmul_kernel(
    grad,  # (size, n)
    x,  # (size, k)
    cols,  # (nnz,) int16 holding uint16, or int32
    row_ptr,  # (n + 1,) int64
    out,  # (nnz,)
    size,
    stride_gb,
    stride_gn,
    stride_xb,
    stride_xk,
    BLOCK_NNZ: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(row_ptr + row) + tl.program_id(1) * BLOCK_NNZ
    last = tl.load(row_ptr + row + 1)
    for start in range(first, last, tl.num_programs(1) * BLOCK_NNZ):
        at = start + tl.arange(0, BLOCK_NNZ)
        col = tl.load(cols + at, mask=at < last, other=0)
        if cols.dtype.element_ty == tl.int16:
            col = col.to(tl.uint16, bitcast=True)
        col = col.to(tl.int64)[:, None]
        acc = tl.zeros((BLOCK_NNZ, BLOCK_B), tl.float32)
        for begin in range(0, size, BLOCK_B):
            batch = (begin + tl.arange(0, BLOCK_B).to(tl.int64))[None, :]
            inside = batch < size
            g = tl.load(grad + batch * stride_gb + row * stride_gn, mask=inside, other=0.0)
            xs = tl.load(x + batch * stride_xb + col * stride_xk, mask=inside, other=0.0)
            g = tl.broadcast_to(g.to(tl.float32), (BLOCK_NNZ, BLOCK_B))
            acc = tl.fma(g, tl.broadcast_to(xs.to(tl.float32), (BLOCK_NNZ, BLOCK_B)), acc)
        tl.store(out + at, tl.sum(acc, axis=1).to(out.dtype.element_ty), mask=at < last)
