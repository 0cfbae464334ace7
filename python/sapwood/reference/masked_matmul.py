"""Masked matrix products in plain torch.

    y = act(x (W o M)^T + b)        masked_matmul, packed_linear_*
    dW[i, j] = sum_b g[b, i] x[b, j]  at the positions of the mask: sampled_matmul

Every function has the signature of the op of the same name in ``csrc/schema.cpp``. B is the batch,
K the input features, N the output features, nnz the number of kept weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 64  # rows of a SELL slice
REACH = 31  # columns a SELL step can address
ABSENT = 31  # SELL index of a row that has no entry in a step
CHUNK = 128  # rows that are ordered by length together

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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


# SELL: slices of 64 rows advance together, in steps that reach 31 columns -------------------------


def pack_sell(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy schedule: a step begins at the leftmost column that waits in any row of the slice.

    Every row whose next column lies within reach of the step takes part in it.
    """
    n, _ = weight.shape
    values, index, window, ends = [], [], [], [0]
    for first in range(0, n, SLICE):
        waiting = [row.nonzero().flatten().tolist() for row in mask[first : first + SLICE]]
        while any(waiting):
            start = min(columns[0] for columns in waiting if columns)
            entries, offsets = weight.new_zeros(SLICE), torch.full((SLICE,), ABSENT)
            for lane, columns in enumerate(waiting):
                if columns and columns[0] - start < REACH:
                    entries[lane] = weight[first + lane, columns[0]]
                    offsets[lane] = columns.pop(0) - start
            values.append(entries)
            index.append(offsets)
            window.append(start)
        ends.append(len(window))
    device = weight.device
    return (
        torch.stack(values) if values else weight.new_empty(0, SLICE),
        torch.stack(index).to(device, torch.uint8)
        if index
        else torch.empty(0, SLICE, dtype=torch.uint8, device=device),
        torch.tensor(window, dtype=torch.int32, device=device),
        torch.tensor(ends, device=device),
    )


def packed_linear_sell(
    x: Tensor,
    values: Tensor,  # (steps, 64), 0 where absent
    index: Tensor,  # (steps, 64) uint8, column minus the step's window; ABSENT without an entry
    window: Tensor,  # (steps,) int32, first column of the step
    slice_ptr: Tensor,  # (ceil(N / 64) + 1,) first step of each slice
    bias: Tensor | None,
    n: int,
    k: int,
    activation: str,
) -> Tensor:
    dense = dense_from_sell(values, index, window, slice_ptr, shape=(n, k))
    return _linear(x, dense, bias, activation)


def dense_from_sell(
    values: Tensor, index: Tensor, window: Tensor, slice_ptr: Tensor, *, shape: tuple[int, int]
) -> Tensor:  # (N, K)
    step, lane = (index != ABSENT).nonzero(as_tuple=True)
    positions = sell_positions(index, window, slice_ptr)
    return values.new_zeros(shape).index_put(positions, values[step, lane])


def sell_positions(index: Tensor, window: Tensor, slice_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries, in the order of the present slots."""
    slices = row_indices(slice_ptr, len(window))
    step, lane = (index != ABSENT).nonzero(as_tuple=True)
    return slices[step] * SLICE + lane, window[step].long() + index[step, lane].long()
