"""Masked matrix products in plain torch.

    y = act(x (W o M)^T + b)        masked_matmul, packed_linear_*
    dW[i, j] = sum_b g[b, i] x[b, j]  at the positions of the mask: sampled_matmul

Every function has the signature of the op of the same name in ``csrc/schema.cpp``. B is the batch,
K the input features, N the output features, nnz the number of kept weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 16  # rows of a SELL slice: the lanes of a 512-bit register
SEGMENT = 32  # columns of a SELL segment: two registers of inputs
CHUNK = 128  # rows that are ordered by length together

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def masked_matmul(
    x: Tensor,  # (B, K)
    weight: Tensor,  # (N, K)
    mask: Tensor,  # (N, K) bool
    bias: Tensor | None,  # (N,)
    dense_weight_grad: bool,
) -> Tensor:  # (B, N)
    return F.linear(x, torch.where(mask, weight, 0.0), bias)


def masked_matmul_backward(
    grad: Tensor,  # (B, N)
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    need_x: bool,
    need_weight: bool,
    dense_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = grad @ torch.where(mask, weight, 0.0) if need_x else grad.new_empty(0)
    if not need_weight:
        return grad_x, grad.new_empty(0)
    grad_weight = grad.mT @ x
    return grad_x, grad_weight if dense_weight_grad else torch.where(mask, grad_weight, 0.0)


def pack_csr(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = mask.nonzero(as_tuple=True)
    return (
        weight[rows, cols],
        cols.to(_column_dtype(weight.shape[1])),
        _row_ptr(mask.sum(1)),
        _row_order(mask.sum(1)),
    )


def pack_bitmap(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded = F.pad(mask, (0, -mask.shape[1] % 16)).unflatten(1, (-1, 16))  # (N, words, 16)
    bits = torch.arange(16, device=mask.device)
    words = (padded.long() << bits).sum(2).to(torch.int16)
    return weight[mask], words, _row_ptr(mask.sum(1))


def transpose_csr(cols: Tensor, row_ptr: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, rows = column_indices(cols), row_indices(row_ptr, len(cols))
    perm = torch.argsort(columns, stable=True)
    lengths = torch.bincount(columns, minlength=k)
    cols_t = rows[perm].to(_column_dtype(len(row_ptr) - 1))
    return cols_t, _row_ptr(lengths), _row_order(lengths), perm


def packed_linear_csr(
    x: Tensor,  # (B, K)
    values: Tensor,  # (nnz,)
    cols: Tensor,  # (nnz,)
    row_ptr: Tensor,  # (N + 1,)
    row_order: Tensor,  # (N,)
    bias: Tensor | None,
    k: int,
    activation: str,
    cols_t: Tensor | None = None,
    row_ptr_t: Tensor | None = None,
    row_order_t: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:  # (B, N)
    return _linear(x, dense_from_csr(values, cols, row_ptr, k), bias, activation)


def packed_linear_bitmap(
    x: Tensor,
    values: Tensor,
    words: Tensor,  # (N, ceil(K / 16))
    row_ptr: Tensor,
    bias: Tensor | None,
    k: int,
    activation: str,
) -> Tensor:
    return _linear(x, dense_from_bitmap(values, words, k), bias, activation)


def sampled_matmul(grad: Tensor, x: Tensor, cols: Tensor, row_ptr: Tensor) -> Tensor:
    rows = row_indices(row_ptr, len(cols))
    return (grad.mT @ x)[rows, column_indices(cols)]


def dense_from_csr(values: Tensor, cols: Tensor, row_ptr: Tensor, k: int) -> Tensor:  # (N, K)
    dense = values.new_zeros(len(row_ptr) - 1, k)
    return dense.index_put((row_indices(row_ptr, len(cols)), column_indices(cols)), values)


def dense_from_bitmap(values: Tensor, words: Tensor, k: int) -> Tensor:  # (N, K)
    mask = mask_from_bitmap(words, k)
    return values.new_zeros(mask.shape).index_put(mask.nonzero(as_tuple=True), values)


def mask_from_bitmap(words: Tensor, k: int) -> Tensor:  # (N, K) bool
    bits = torch.arange(16, device=words.device)
    return ((words.long()[:, :, None] >> bits) & 1).flatten(1)[:, :k].bool()


def column_indices(cols: Tensor) -> Tensor:  # (nnz,) int64
    """Columns are stored as uint16 bit patterns in int16 while K <= 65536."""
    return cols.long() & 0xFFFF if cols.dtype == torch.int16 else cols.long()


def row_indices(row_ptr: Tensor, nnz: int) -> Tensor:  # (nnz,) int64
    rows = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    return rows.repeat_interleave(row_ptr.diff(), output_size=nnz)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight.to(x.dtype), bias))


def _column_dtype(k: int) -> torch.dtype:
    return torch.int16 if k <= 65536 else torch.int32


def _row_ptr(lengths: Tensor) -> Tensor:
    return F.pad(lengths.long().cumsum(0), (1, 0))


def _row_order(lengths: Tensor) -> Tensor:
    """Rows by descending length inside chunks, so that neighbours cost the same."""
    chunk = torch.arange(len(lengths), device=lengths.device) // CHUNK
    key = chunk * (int(lengths.max()) + 1 if len(lengths) else 1) - lengths
    return torch.argsort(key, stable=True).to(torch.int32)


# SELL: slices of 16 rows x segments of 32 columns, walked in steps of one entry per row ------------


def pack_sell(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    slices, segments = -(-n // SLICE), -(-k // SEGMENT)
    padded = F.pad(mask, (0, segments * SEGMENT - k, 0, slices * SLICE - n))
    tiles = padded.view(slices, SLICE, segments, SEGMENT).transpose(1, 2)  # (S, G, lane, column)
    counts = tiles.sum(3)  # entries of each lane
    steps = counts.amax(2) if counts.numel() else counts.new_zeros(slices, segments)
    step_ptr = _row_ptr(steps.flatten())
    slice_, segment, lane, column = tiles.nonzero(as_tuple=True)
    rank = tiles.long().cumsum(3)[slice_, segment, lane, column] - 1  # step inside the segment
    step = step_ptr[slice_ * segments + segment] + rank
    order = torch.argsort(step * SLICE + lane)
    values = weight[slice_ * SLICE + lane, segment * SEGMENT + column][order]
    index = torch.zeros(int(step_ptr[-1]), SLICE, dtype=torch.uint8, device=mask.device)
    index[step, lane] = column.to(torch.uint8)
    present = torch.zeros(index.shape, dtype=torch.int64, device=mask.device)
    present[step, lane] = 1 << lane
    value_ptr = _row_ptr(counts.sum((1, 2)))
    return values, index, present.sum(1).to(torch.int16), step_ptr, value_ptr


def packed_linear_sell(
    x: Tensor,
    values: Tensor,  # (nnz,) by (slice, segment, step, lane)
    index: Tensor,  # (steps, 16) uint8, column inside the segment
    lanes: Tensor,  # (steps,) int16, bit l: row l of the slice has an entry in this step
    step_ptr: Tensor,  # (slices * segments + 1,)
    value_ptr: Tensor,  # (slices + 1,)
    bias: Tensor | None,
    n: int,
    k: int,
    activation: str,
) -> Tensor:
    dense = dense_from_sell(values, index, lanes, step_ptr, value_ptr, shape=(n, k))
    return _linear(x, dense, bias, activation)


def dense_from_sell(
    values: Tensor,
    index: Tensor,
    lanes: Tensor,
    step_ptr: Tensor,
    value_ptr: Tensor,
    *,
    shape: tuple[int, int],
) -> Tensor:  # (N, K)
    rows, columns = sell_positions({"index": index, "lanes": lanes, "step_ptr": step_ptr}, shape[1])
    return values.new_zeros(shape).index_put((rows, columns), values)


def sell_positions(layout: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries, in the order of the values."""
    segments = -(-k // SEGMENT)
    tile = row_indices(layout["step_ptr"], layout["lanes"].numel())
    step, lane = lane_bits(layout["lanes"]).nonzero(as_tuple=True)
    columns = tile[step] % segments * SEGMENT + layout["index"][step, lane].long()
    return tile[step] // segments * SLICE + lane, columns


def sell_slices(layout: dict[str, Tensor], k: int) -> Tensor:  # (steps,)
    """The slice each step belongs to."""
    return row_indices(layout["step_ptr"], layout["lanes"].numel()) // max(1, -(-k // SEGMENT))


def lane_bits(lanes: Tensor) -> Tensor:  # (steps, 16) bool
    return ((lanes.long()[:, None] >> torch.arange(SLICE, device=lanes.device)) & 1).bool()
