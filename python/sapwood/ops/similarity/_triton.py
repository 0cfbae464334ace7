"""The Triton kernel as ``sapwood::similarity_pairs_triton``, for CUDA without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
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


def why_not(x: Tensor, y: Tensor | None, threshold: float, kind: str = "cosine") -> str | None:
    """Why Triton cannot find these pairs; None when it can."""
    if kind not in reference.UNIT_KINDS:
        return f"takes cosine and correlation, not {kind}"
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def find_pairs(
    x: Tensor,
    y: Tensor | None,
    threshold: float,
    kind: str,
    absolute: bool,
    include_self: bool,
    max_pairs: int,
    recheck: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``similarity_pairs`` by the Triton kernel."""
    wide = reference.widened(x)
    other = wide if y is None else reference.widened(y)
    unit = reference.row_normalize(wide, kind)
    unit_other = unit if y is None else reference.row_normalize(other, kind)

    def exact(a: Tensor, b: Tensor) -> Tensor:
        rows = (reference.row_normalize(t.double(), kind) for t in (a, b))
        product: Tensor = torch.linalg.vecdot(*rows)
        return product

    row, col, value = _kernels.similarity.similarity_pairs(
        wide,
        other,
        unit,
        unit_other,
        threshold,
        self_=y is None,
        include_self=include_self,
        absolute=absolute,
        recheck=recheck,
        exact=exact,
    )
    truncated = torch.tensor(0 <= max_pairs < len(row), device=x.device)
    kept = slice(None, None if max_pairs < 0 else max_pairs)
    return row[kept].clone(), col[kept].clone(), value[kept].clone(), truncated


def _define() -> Any:
    """An op with the schema of the compiled one."""
    name = "similarity_pairs"
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", find_pairs, "CUDA")
    spec = _register.declared()[name]
    return _register.define_op(dataclasses.replace(spec, name=f"{name}_triton", variant=True))


assert _specs.similarity_pairs is not None  # declared before its variant
_PAIRS = _backend.Backend("triton", why_not, _define())


def backends(op: str) -> tuple[_backend.Backend, ...]:
    """The Triton backends of an op."""
    return (_PAIRS,) if op == "similarity_pairs" else ()
