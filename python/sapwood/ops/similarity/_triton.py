"""The Triton kernels as ``sapwood::similarity_*_triton``, for CUDA without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _register
from sapwood.ops.similarity import _specs
from sapwood.reference import similarity as reference

# Typed loosely: mypy does not see the folder that is installed as sapwood.triton_kernels.
_kernels: Any = importlib.import_module("sapwood.triton_kernels")
_library = torch.library.Library("sapwood", "FRAGMENT")
_WITHOUT_NAMESPACE = len("sapwood::")


def _why_not(x: Tensor, kind: str) -> str | None:
    if kind not in reference.UNIT_KINDS:
        return f"takes cosine and correlation, not {kind}"
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def why_not_pairs(x: Tensor, y: Tensor | None, threshold: float, kind: str) -> str | None:
    """Why Triton cannot find these pairs; None when it can."""
    return _why_not(x, kind)


def why_not_topk(x: Tensor, y: Tensor | None, k: int, kind: str) -> str | None:
    """Why Triton cannot rank these rows; None when it can."""
    return _why_not(x, kind)


def why_not_clusters(x: Tensor, threshold: float, kind: str) -> str | None:
    """Why Triton cannot find these clusters; None when it can."""
    return _why_not(x, kind)


def _rows(
    x: Tensor, y: Tensor | None, kind: str, absolute: bool, recheck: bool, precision: str
) -> Any:
    """What the kernels search in, with the exact similarities of the original rows."""
    sides = [reference.widened(t).contiguous() for t in (x, y) if t is not None]
    units = [reference.row_normalize(t, kind) for t in sides]
    if precision == "bf16":
        units = [u.bfloat16() for u in units]

    def exact(row: Tensor, col: Tensor) -> Tensor:
        rows = (sides[0][row].double(), sides[-1][col].double())
        product: Tensor = torch.linalg.vecdot(*(reference.row_normalize(r, kind) for r in rows))
        return product

    return _kernels.similarity.Rows(units[0], units[-1], y is None, absolute, recheck, exact)


def find_pairs(
    x: Tensor,
    y: Tensor | None,
    threshold: float,
    kind: str,
    absolute: bool,
    include_self: bool,
    max_pairs: int,
    recheck: bool,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``similarity_pairs`` by the Triton kernel."""
    rows = _rows(x, y, kind, absolute, recheck, precision)
    row, col, value, truncated = _kernels.similarity.similarity_pairs(
        rows, threshold, include_self=include_self, max_pairs=max_pairs
    )
    return row, col, value, torch.tensor(truncated, device=x.device)


def find_topk(
    x: Tensor,
    y: Tensor | None,
    k: int,
    kind: str,
    absolute: bool,
    include_self: bool,
    recheck: bool,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """The op ``similarity_topk`` by the Triton kernel."""
    rows = _rows(x, y, kind, absolute, recheck, precision)
    found: tuple[Tensor, Tensor] = _kernels.similarity.similarity_topk(
        rows, k, include_self=include_self
    )
    return found


def find_clusters(x: Tensor, threshold: float, kind: str, absolute: bool) -> Tensor:
    """The op ``similarity_clusters`` by the Triton kernels."""
    rows = _rows(x, None, kind, absolute, True, "fp32")
    labels: Tensor = _kernels.similarity.similarity_clusters(rows, threshold)
    return labels


def _define(name: str, run: Callable[..., Any]) -> Any:
    """An op with the schema of the compiled one."""
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", run, "CUDA")
    assert name in dir(_specs)  # declared before its variant
    spec = _register.declared()[name]
    return _register.define_op(dataclasses.replace(spec, name=f"{name}_triton", variant=True))


_FUNCTIONS: dict[str, tuple[Callable[..., str | None], Callable[..., Any]]] = {
    "similarity_pairs": (why_not_pairs, find_pairs),
    "similarity_topk": (why_not_topk, find_topk),
    "similarity_clusters": (why_not_clusters, find_clusters),
}
_BACKENDS = {
    name: _backend.Backend("triton", why_not, _define(name, run))
    for name, (why_not, run) in _FUNCTIONS.items()
}


def backend(op: str) -> _backend.Backend:
    """The Triton backend of an op."""
    return _BACKENDS[op]
