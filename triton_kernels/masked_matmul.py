"""Triton launchers of masked_matmul: y = activation(x (W o M)^T + b), and dW on the mask.

Same meaning as the ops of these names in ``csrc/schema.cpp``, for tensors of one CUDA device. All
products accumulate in float32, in an order fixed by the shapes: bitwise equal from call to call.
Nothing synchronises. Configurations come from small tables by shape, never from timing; the
tables were chosen from registers, spills and shared memory of the compiled code, not yet from
measurements on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import AotCase, Config, Wrap, cdiv, launch
from ._masked_matmul_kernels import (
    masked_matmul_kernel,
    packed_linear_kernel,
    sampled_matmul_kernel,
    sum_splits_kernel,
)

__all__ = ["AOT_CASES", "masked_matmul", "packed_linear_bitmap", "sampled_matmul"]


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
    bias_or_dummy = x if bias is None else bias.contiguous()  # the kernel wants a pointer
    values, words = values.contiguous(), words.contiguous()
    sizes = (size, n, k, words.shape[1], per_split, *x.stride())
    grid = (cdiv(n, block_n) * cdiv(size, block_b), splits)
    args = (x, values, words, row_ptr.contiguous(), bias_or_dummy, partial, *sizes)
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation}
    launch(packed_linear_kernel, grid, config, wrap, args, **epilogue, SPLIT=splits > 1)
    if splits > 1:
        blocks = cdiv(size * n, _SUM.tile["BLOCK"])
        sums = (partial, bias_or_dummy, out, size * n, n, splits)
        launch(sum_splits_kernel, (blocks,), _SUM, wrap, sums, **epilogue)
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
    bias_or_dummy = x if bias is None else bias.contiguous()  # the kernel wants a pointer
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


def _aot_case(
    kernel: Any, config: Config, pointers: dict[str, str], integer: str = "i32", **constants: Any
) -> AotCase:
    constexprs = {**constants, **config.tile}
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, integer)
        for name in kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return kernel, signature, constexprs, {**options, "enable_fp_fusion": False}


def _aot_packed(config: Config, x: str, values: str, *, split: bool) -> AotCase:
    pointers = {"x": x, "values": values, "words": "*i16", "row_ptr": "*i64", "bias": x}
    pointers["out"] = "*fp32" if split else x
    constants: dict[str, Any] = {
        "stride_xk": 1,
        "HAS_BIAS": True,
        "ACTIVATION": "gelu",
        "SPLIT": split,
    }
    return _aot_case(packed_linear_kernel, config, pointers, **constants)


def _aot_masked(config: Config, x: str, integer: str = "i32") -> AotCase:
    pointers = {"x": x, "weight": x, "mask": "*u8", "bias": x, "out": x}
    constants: dict[str, Any] = {"stride_xk": 1, "stride_wk": 1, "stride_mk": 1, "HAS_BIAS": True}
    return _aot_case(masked_matmul_kernel, config, pointers, integer, **constants)


def _aot_sampled(config: Config, x: str, cols: str) -> AotCase:
    pointers = {"grad": x, "x": x, "cols": cols, "row_ptr": "*i64", "out": x}
    return _aot_case(sampled_matmul_kernel, config, pointers, stride_gn=1, stride_xb=1)


#: What to compile ahead of time: (kernel, signature, constexprs, options), specialised as the
#: launchers do it for contiguous tensors. Every entry of the tables occurs.
AOT_CASES: list[AotCase] = [
    *(_aot_packed(c, "*fp16", "*fp16", split=b <= _SPLIT_BATCH) for b, c in _PACKED[2].items()),
    *(_aot_packed(c, "*fp32", "*fp32", split=b <= _SPLIT_BATCH) for b, c in _PACKED[4].items()),
    _aot_packed(_PACKED[2][64], "*bf16", "*bf16", split=False),
    _aot_packed(_PACKED[4][16], "*fp32", "*bf16", split=False),
    _aot_case(
        sum_splits_kernel,
        _SUM,
        {"partial": "*fp32", "bias": "*fp16", "out": "*fp16"},
        HAS_BIAS=True,
        ACTIVATION="gelu_tanh",
    ),
    *(_aot_masked(c, "*fp16") for c in _MASKED[2].values()),
    *(_aot_masked(c, "*fp32") for c in _MASKED[4].values()),
    _aot_masked(_MASKED[2][128], "*bf16", "i64"),
    *(_aot_sampled(c, "*fp32", "*i16") for c in _SAMPLED.values()),
    _aot_sampled(_SAMPLED[64], "*bf16", "*i32"),
]
