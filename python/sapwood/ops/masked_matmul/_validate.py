"""Checks that tensors from a file describe a packed weight, before any kernel reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from sapwood.ops.masked_matmul._layouts import FIELDS, Layout
from sapwood.reference import masked_matmul as reference

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _refuse(expectation: str) -> NoReturn:
    raise ValueError(f"sapwood.PackedWeight.from_tensors: {expectation}")


def _require(condition: bool, expectation: str) -> None:
    if not condition:
        _refuse(expectation)


def validated(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], dict[str, Layout]]:
    """Shape and layouts of what :meth:`PackedWeight.tensors` wrote."""
    _require("shape" in tensors, "tensor 'shape' is missing")
    sizes = tensors["shape"].tolist()
    _require(
        isinstance(sizes, list) and len(sizes) == 2 and min(sizes) >= 0,
        f"'shape' must hold two sizes, got {sizes}",
    )
    shape = (int(sizes[0]), int(sizes[1]))
    layouts: dict[str, Layout] = {}
    for name in tensors:
        if name == "shape":
            continue
        fmt, _, part = name.partition(".")
        _require(part in FIELDS.get(fmt, ()), f"unknown tensor {name!r}")
        layouts.setdefault(fmt, {})
    _require(bool(layouts), "no format is present")
    for fmt in layouts:
        layouts[fmt] = {part: _part(tensors, fmt, part) for part in FIELDS[fmt]}
        _CHECKS[fmt](layouts[fmt], shape)
    return shape, layouts


def _part(tensors: Mapping[str, Tensor], fmt: str, part: str) -> Tensor:
    name = f"{fmt}.{part}"
    if name == "bitmap.values" and name not in tensors:
        name = "csr.values"  # both formats share one tensor
    _require(name in tensors, f"tensor {name!r} is missing")
    return tensors[name]


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    _require(tuple(t.shape) == shape, f"{name} must have shape {shape}, got {tuple(t.shape)}")
    _require(t.dtype in dtypes, f"{name} must be one of {dtypes}, got {t.dtype}")


def _check_pointer(name: str, pointer: Tensor, count: int, end: int) -> None:
    _check_shape(name, pointer, (count + 1,), torch.int64)
    _require(
        int(pointer[0]) == 0 and int(pointer[-1]) == end and bool((pointer.diff() >= 0).all()),
        f"{name} must rise from 0 to {end}",
    )


def _check_dense(layout: Layout, shape: tuple[int, int]) -> None:
    _check_shape("dense.weight", layout["weight"], shape, *_FLOATS)


def _check_csr(layout: Layout, shape: tuple[int, int]) -> None:
    n, k = shape
    values, cols = layout["values"], layout["cols"]
    _check_shape("csr.values", values, (values.numel(),), *_FLOATS)
    _check_shape("csr.cols", cols, tuple(values.shape), torch.int16 if k <= 65536 else torch.int32)
    _check_pointer("csr.row_ptr", layout["row_ptr"], n, values.numel())
    columns = reference.column_indices(cols)
    rows = reference.row_indices(layout["row_ptr"], values.numel())
    in_range = columns.numel() == 0 or (int(columns.min()) >= 0 and int(columns.max()) < k)
    _require(in_range, f"csr.cols must lie in 0..{k - 1}")
    rising = (columns.diff() > 0) | (rows.diff() > 0)
    _require(bool(rising.all()), "csr.cols must ascend inside each row")
    order = layout["row_order"]
    _check_shape("csr.row_order", order, (n,), torch.int32)
    _require(
        torch.equal(order.long().sort().values, torch.arange(n)),
        "csr.row_order must be a permutation of the rows",
    )


def _check_bitmap(layout: Layout, shape: tuple[int, int]) -> None:
    n, k = shape
    values, words = layout["values"], layout["words"]
    _check_shape("bitmap.values", values, (values.numel(),), *_FLOATS)
    _check_shape("bitmap.words", words, (n, (k + 15) // 16), torch.int16)
    _check_pointer("bitmap.row_ptr", layout["row_ptr"], n, values.numel())
    bits = reference.mask_from_bitmap(words, words.shape[1] * 16)
    _require(not bool(bits[:, k:].any()), f"bitmap.words must have no bit beyond column {k - 1}")
    _require(
        torch.equal(bits.sum(1), layout["row_ptr"].diff()),
        "bitmap.words must have as many bits per row as bitmap.row_ptr says",
    )


def _check_sell(layout: Layout, shape: tuple[int, int]) -> None:
    n, k = shape
    values, index, window = layout["values"], layout["index"], layout["window"]
    steps, slices = window.numel(), -(-n // reference.SLICE)
    _check_shape("sell.window", window, (steps,), torch.int32)
    _check_shape("sell.values", values, (steps, reference.SLICE), *_FLOATS)
    _check_shape("sell.index", index, (steps, reference.SLICE), torch.uint8)
    _check_pointer("sell.slice_ptr", layout["slice_ptr"], slices, steps)
    _require(bool((index <= reference.ABSENT).all()), f"sell.index must be <= {reference.ABSENT}")
    _require(bool(((window >= 0) & (window < k)).all()), f"sell.window must lie in 0..{k - 1}")
    rows, columns = reference.sell_positions(index, window, layout["slice_ptr"])
    _require(
        bool((rows < n).all())
        and bool((columns < k).all())
        and len(torch.unique(rows * k + columns)) == len(rows),
        f"sell.index and sell.window must address distinct entries of {shape}",
    )
    _require(
        not bool(values[index == reference.ABSENT].any()),
        "sell.values must be 0 where sell.index is absent",
    )


_CHECKS = {
    "dense": _check_dense,
    "csr": _check_csr,
    "bitmap": _check_bitmap,
    "sell": _check_sell,
}
