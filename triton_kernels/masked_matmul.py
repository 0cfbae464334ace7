"""Triton kernels of masked_matmul: y = activation(x (W o M)^T + b), and dW at the mask's positions.

All products accumulate in float32, in an order fixed by the shapes: bitwise equal from call to
call. Offsets into tensors are 64-bit. Configurations come from small tables by shape, never from
timing. W is the left operand of every ``tl.dot``, because it is computed in registers, and only
the left operand of a tensor-core product may stay there.
"""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, Config, Wrap, cdiv, launch

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


def _config(tile: tuple[int, int, int], num_warps: int, num_stages: int) -> Config:
    return Config(
        dict(zip(("BLOCK_N", "BLOCK_B", "BLOCK_K"), tile, strict=True)), num_warps, num_stages
    )


# Largest batch -> configuration, by bytes per activation; the last entry takes every larger batch.
_Table = dict[int, Config]
_PACKED: dict[int, _Table] = {
    2: {
        1: _config((16, 1, 256), 4, 2),
        16: _config((64, 16, 64), 4, 3),
        32: _config((64, 32, 64), 4, 3),
        64: _config((64, 64, 64), 4, 3),
        128: _config((64, 128, 64), 8, 3),
    },
    4: {
        1: _config((16, 1, 256), 4, 2),
        16: _config((64, 16, 32), 4, 2),
        32: _config((64, 32, 32), 4, 2),
        64: _config((64, 64, 32), 8, 2),
    },
}
_MASKED: dict[int, _Table] = {
    2: {
        16: _config((32, 16, 128), 4, 3),
        64: _config((64, 64, 64), 4, 3),
        128: _config((128, 128, 32), 8, 3),
    },
    4: {
        16: _config((32, 16, 64), 4, 3),
        64: _config((64, 64, 32), 4, 3),
        128: _config((64, 128, 32), 8, 2),
    },
}
_SAMPLED: _Table = {
    1: Config({"BLOCK_NNZ": 256, "BLOCK_B": 1}, 4, 1),
    16: Config({"BLOCK_NNZ": 64, "BLOCK_B": 16}, 4, 1),
    64: Config({"BLOCK_NNZ": 32, "BLOCK_B": 64}, 4, 2),
}
_SUM = Config({"BLOCK": 512}, 4, 2)

_SPLIT_BATCH = 64  # above it there are enough batch tiles, and the partial sums would be large
_PROGRAMS = 256  # about two per multiprocessor of a large device
_SPLIT_COLUMNS = 512  # least work per split
_MOST_SPLITS = 8


def _choose(table: _Table, size: int) -> Config:
    *smaller, largest = table.items()
    for batch, config in smaller:
        if size <= batch:
            return config
    return largest[1]


def _splits(size: int, n: int, k: int, block_n: int) -> int:
    """How many ranges of columns are summed by programs of their own, to fill the device."""
    if size > _SPLIT_BATCH:
        return 1
    return max(1, min(_PROGRAMS // cdiv(n, block_n), k // _SPLIT_COLUMNS, _MOST_SPLITS))


def packed_linear_bitmap(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    k: int,
    activation: str,
    *,
    wrap: Wrap | None = None,
) -> Tensor:
    """activation(x W^T + bias) for a weight packed as a bitmap.

    Args:
        x: (B, k) float32, float16 or bfloat16, any strides.
        values: (nnz,) in x's dtype, or half precision with float32 x.
        words: (N, ceil(k / 16)) int16; bit c of word j of row i says that (i, 16 j + c) is present.
        row_ptr: (N + 1,) int64, where each row's values start.
        bias: (N,) or None.
        k: Columns of the weight.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, N), contiguous, in x's dtype.
    """
    size, n = x.shape[0], words.shape[0]
    out = x.new_empty((size, n))
    if size == 0 or n == 0:
        return out
    config = _choose(_PACKED[x.element_size()], size)
    block_n, block_b, block_k = config.tile.values()
    splits = _splits(size, n, k, block_n)
    per_split = cdiv(cdiv(k, splits), block_k) * block_k
    partial = out if splits == 1 else x.new_empty((splits, size, n), dtype=torch.float32)
    bias_or_dummy = out if bias is None else bias.contiguous()
    values, words = values.contiguous(), words.contiguous()
    sizes = (size, n, k, words.shape[1], per_split, *x.stride())
    grid = (cdiv(n, block_n) * cdiv(size, block_b), splits)
    args = (x, values, words, row_ptr.contiguous(), bias_or_dummy, partial, *sizes)
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation}
    launch(packed_linear_kernel, grid, config, wrap, args, **epilogue, SPLIT=splits > 1)
    if splits > 1:
        grid = (cdiv(size * n, _SUM.tile["BLOCK"]),)
        args = (partial, bias_or_dummy, out, size * n, n, splits)
        launch(sum_splits_kernel, grid, _SUM, wrap, args, **epilogue)
    return out


def masked_matmul(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *,
    wrap: Wrap | None = None,
) -> Tensor:
    """x where(mask, weight, 0)^T + bias, masked inside the tile: no buffer for the product.

    The gradient of x is the same function: ``masked_matmul(grad, weight.t(), mask.t(), None)``.

    Args:
        x: (B, K) float32, float16 or bfloat16, any strides.
        weight: (N, K) in x's dtype, any strides.
        mask: (N, K) bool or uint8, any strides.
        bias: (N,) or None.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, N), contiguous, in x's dtype.
    """
    size, (n, k) = x.shape[0], weight.shape
    out = x.new_empty((size, n))
    if size == 0 or n == 0:
        return out
    config = _choose(_MASKED[x.element_size()], size)
    grid = (cdiv(n, config.tile["BLOCK_N"]) * cdiv(size, config.tile["BLOCK_B"]),)
    bias_or_dummy = out if bias is None else bias.contiguous()
    strides = (*x.stride(), *weight.stride(), *mask.stride())
    args = (x, weight, mask.view(torch.uint8), bias_or_dummy, out, size, n, k, *strides)
    launch(masked_matmul_kernel, grid, config, wrap, args, HAS_BIAS=bias is not None)
    return out


def sampled_matmul(
    grad: Tensor,
    x: Tensor,
    cols: Tensor,
    row_ptr: Tensor,
    *,
    wrap: Wrap | None = None,
) -> Tensor:
    """grad^T x at the positions of a CSR structure only: the gradient of its values.

    Args:
        grad: (B, N) in x's dtype, any strides.
        x: (B, K) float32, float16 or bfloat16, any strides.
        cols: (nnz,) int32, or int16 holding the bits of uint16.
        row_ptr: (N + 1,) int64.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (nnz,) in x's dtype: sum_b grad[b, row] x[b, col].
    """
    size, n = grad.shape
    out = x.new_empty(cols.shape)
    if n == 0:
        return out
    config = _choose(_SAMPLED, size)
    columns = x.t().contiguous()  # (K, B): the batch of one column lies together
    per_row = min(64, cdiv(4 * _PROGRAMS, n))  # programs that share a row, for few long rows
    strides = (*grad.stride(), columns.stride(1), columns.stride(0))
    args = (grad, columns, cols.contiguous(), row_ptr.contiguous(), out, size, *strides)
    launch(sampled_matmul_kernel, (n, per_row), config, wrap, args)
    return out
