"""The kernel behind ``copruned_conv``; shapes stand beside the arguments."""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRETED

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16
RELU, GELU, SILU, LEAKY_RELU = (tl.constexpr(i) for i in (1, 2, 3, 4))  # 0 is none


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z < 0, 0.0, z)
    if ACTIVATION == GELU:
        return 0.5 * z * (1 + tl.math.erf(z * 0.70710678118654752440))
    if ACTIVATION == SILU:
        return z / (1 + tl.exp(-z))
    if ACTIVATION == LEAKY_RELU:
        return tl.where(z < 0, 0.2 * z, z)
    return z


@triton.jit
def copruned_conv_kernel(
    x,  # (b, rows, cols, channels)
    weight,  # filters, channels, kernel rows and columns by their strides
    bias,  # (filters,)
    residual,  # (b, out_rows, out_cols, filters)
    y,  # likewise; 0 or the residual where nothing is computed
    items,  # (b, tiles) int64, kept tiles first
    item_counts,  # (b,) int64
    filter_groups,  # (b, filters / GROUP) int64, kept ones first
    filter_counts,  # (b,) int64
    input_groups,  # (b, channels / GROUP) int64, kept ones first
    input_counts,  # (b,) int64
    rows,
    cols,
    channels,
    out_rows,
    out_cols,
    filters,
    tile_cols,
    tiles,
    weight_filter,
    weight_channel,
    weight_row,
    weight_col,
    step_row,
    step_col,
    pad_row,
    pad_col,
    dilation_row,
    dilation_col,
    ROWS: tl.constexpr,  # of the kernel
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_REGION: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    kept_tiles = tiles.to(tl.int64)
    chunks = tl.cdiv(kept_tiles * TILE * TILE, BLOCK_M)
    blocks = tl.cdiv(filters, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    b = program // (chunks * blocks)
    chunk = program // blocks % chunks
    kept_filters = filters.to(tl.int64)
    kept_channels = channels.to(tl.int64)
    if HAS_REGION:
        kept_tiles = tl.load(item_counts + b)
    if HAS_FILTERS:
        kept_filters = tl.load(filter_counts + b) * GROUP
    if HAS_INPUTS:
        kept_channels = tl.load(input_counts + b) * GROUP
    n = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    if chunk * BLOCK_M >= kept_tiles * TILE * TILE or program % blocks * BLOCK_N >= kept_filters:
        return
    wanted = p < kept_tiles * TILE * TILE
    number = p // (TILE * TILE)
    if HAS_REGION:
        number = tl.load(items + b * tiles + number, mask=wanted, other=0)
    i = number // tile_cols * TILE + p % (TILE * TILE) // TILE
    j = number % tile_cols * TILE + p % TILE
    wanted = wanted & (i < out_rows) & (j < out_cols)
    k_on = n < kept_filters
    if HAS_FILTERS:
        of_sample = filter_groups + b * (filters // GROUP)
        k = tl.load(of_sample + n // GROUP, mask=k_on, other=0) * GROUP + n % GROUP
    else:
        k = n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(ROWS * COLS):
        r, s = tap // COLS, tap % COLS
        row = i * step_row - pad_row + r * dilation_row
        col = j * step_col - pad_col + s * dilation_col
        inside = wanted & (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        pixel = x + ((b * rows + row) * cols + col) * channels
        tap_row, tap_col = tl.cast(r, tl.int64) * weight_row, tl.cast(s, tl.int64) * weight_col
        taps = weight + k * weight_filter + tap_row + tap_col
        for start in range(0, kept_channels, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K).to(tl.int64)
            c_on = at < kept_channels
            c = at
            if HAS_INPUTS:
                of_inputs = input_groups + b * (channels // GROUP)
                c = tl.load(of_inputs + at // GROUP, mask=c_on, other=0) * GROUP + at % GROUP
            left = tl.load(
                pixel[:, None] + c[None, :], mask=inside[:, None] & c_on[None, :], other=0.0
            )
            right = tl.load(
                taps[None, :] + c[:, None] * weight_channel,
                mask=c_on[:, None] & k_on[None, :],
                other=0.0,
            )
            if UPCAST:
                left = left.to(tl.float32)  # exact
                right = right.to(tl.float32)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k_on, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    place = ((b * out_rows + i) * out_cols + j)[:, None] * filters + k[None, :]
    here = wanted[:, None] & k_on[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + place, mask=here, other=0.0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=here)
