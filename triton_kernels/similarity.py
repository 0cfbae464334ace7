"""Triton launcher of similarity: pairs of unit rows that may reach a threshold.

The kernel proposes, by products in float32 and a limit that is lower by the bound of their error.
The pairs are then decided in float64 from the original rows, by torch, so that they are those of
the compiled kernels. Slots are handed out by an atomic and sorted afterwards; nothing depends on
their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import AotCase, Config, Wrap, cdiv, launch
from ._similarity_kernels import candidates_kernel

__all__ = ["AOT_CASES", "similarity_pairs"]

_TILE = ("BLOCK_N", "BLOCK_M", "BLOCK_K")
#: By bytes per element of the rows.
_CONFIG: dict[int, Config] = {
    2: Config(dict(zip(_TILE, (64, 64, 64), strict=True)), 4, 3),
    4: Config(dict(zip(_TILE, (64, 64, 32), strict=True)), 4, 2),
}
_CHUNK = 1 << 18  # pairs that are decided together


def error_bound(k: int) -> float:
    """How far a product of unit rows of length k may be from the exact one."""
    return max(1e-6, 4 * k**0.5 * torch.finfo(torch.float32).eps)


def _candidates(
    x: Tensor,
    y: Tensor,
    limit: float,
    *,
    self_: bool,
    include_self: bool,
    absolute: bool,
    wrap: Any,
) -> Tensor:
    """Sorted keys row * M + column of the products that reach the limit."""
    n, m = len(x), len(y)
    config = _CONFIG[x.element_size()]
    grid = (cdiv(n, config.tile["BLOCK_N"]) * cdiv(m, config.tile["BLOCK_M"]),)
    capacity = max(4 * n, 1024)
    while True:
        keys = torch.empty(capacity, dtype=torch.int64, device=x.device)
        found = torch.zeros(1, dtype=torch.int64, device=x.device)
        arguments = (x, y, keys, found, n, m, x.shape[1], capacity, limit)
        flags = {"SELF": self_, "INCLUDE_SELF": include_self, "ABSOLUTE": absolute}
        launch(candidates_kernel, grid, config, wrap, arguments, **flags)
        count = int(found)
        if count <= capacity:
            return keys[:count].sort().values
        capacity = count


def similarity_pairs(
    x: Tensor,
    y: Tensor,
    unit_x: Tensor,
    unit_y: Tensor,
    threshold: float,
    *,
    self_: bool,
    include_self: bool,
    absolute: bool,
    recheck: bool,
    exact: Any,
    wrap: Wrap | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose similarity reaches the threshold, sorted by row and column.

    Args:
        x: (N, K) original rows.
        y: (M, K) original rows; x itself when ``self_``.
        unit_x: (N, K) float32 rows of norm 1.
        unit_y: (M, K) likewise.
        threshold: for the similarity, or its magnitude when ``absolute``.
        self_: only pairs with row <= column.
        include_self: with row == column too.
        absolute: compare magnitudes.
        recheck: decide by ``exact``; else by the product.
        exact: (rows of x, rows of y) -> their similarities in float64, both (E, K).
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        row, col (E,) int64 and value (E,) float32.
    """
    n, m, k = len(x), len(y), x.shape[1]
    if n == 0 or m == 0:
        empty = torch.empty(0, dtype=torch.int64, device=x.device)
        return empty, empty.clone(), torch.empty(0, device=x.device)
    slack = error_bound(k) if recheck else 0.0
    keys = _candidates(
        unit_x.contiguous(),
        unit_y.contiguous(),
        threshold - slack,
        self_=self_,
        include_self=include_self,
        absolute=absolute,
        wrap=wrap,
    )
    kept, values = [keys[:0]], [torch.empty(0, device=x.device)]
    for part in keys.split(_CHUNK):
        row, col = part // m, part % m
        if recheck:
            value = exact(x[row], y[col])
        else:
            value = (unit_x[row] * unit_y[col]).sum(1)
        reaches = (value.abs() if absolute else value) >= threshold
        kept.append(part[reaches] if recheck else part)
        values.append((value[reaches] if recheck else value).float())
    keys = torch.cat(kept)
    return keys // m, keys % m, torch.cat(values)


def _aot(x: str, config: Config, **flags: bool) -> AotCase:
    constexprs: dict[str, Any] = {**flags, **config.tile}
    pointers = {"x": x, "y": x, "keys": "*i64", "found": "*i64", "limit": "fp32"}
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32")
        for name in candidates_kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return candidates_kernel, signature, constexprs, {**options, "enable_fp_fusion": False}


#: What to compile ahead of time: (kernel, signature, constexprs, options).
AOT_CASES: list[AotCase] = [
    _aot("*fp32", _CONFIG[4], SELF=True, INCLUDE_SELF=False, ABSOLUTE=False),
    _aot("*fp32", _CONFIG[4], SELF=False, INCLUDE_SELF=False, ABSOLUTE=True),
    _aot("*fp16", _CONFIG[2], SELF=True, INCLUDE_SELF=True, ABSOLUTE=False),
    _aot("*bf16", _CONFIG[2], SELF=False, INCLUDE_SELF=False, ABSOLUTE=False),
]
