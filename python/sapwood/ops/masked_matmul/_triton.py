"""The Triton kernels as ops ``sapwood::<op>_triton``, for CUDA devices without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood import _register

# Typed loosely: mypy does not see the folder that is installed as sapwood.triton_kernels.
_kernels: Any = importlib.import_module("sapwood.triton_kernels")
_library = torch.library.Library("sapwood", "FRAGMENT")
_WITHOUT_NAMESPACE = len("sapwood::")


def why_not(x: Tensor, *_: Any) -> str | None:
    """Why Triton cannot compute a product of ``x``; None when it can."""
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def _masked_matmul(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_weight_grad: bool
) -> Tensor:
    y: Tensor = _kernels.masked_matmul.masked_matmul(x, weight, mask, bias)
    return y


def _packed_linear_bitmap(*args: Any) -> Tensor:
    y: Tensor = _kernels.masked_matmul.packed_linear_bitmap(*args)
    return y


def _sampled_matmul(*args: Any) -> Tensor:
    values: Tensor = _kernels.masked_matmul.sampled_matmul(*args)
    return values


def _define(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    """An op with the schema, derivatives and vmap rule of the compiled one."""
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", kernel, "CUDA")
    spec = _register.declared()[name]
    return _register.define_op(dataclasses.replace(spec, name=f"{name}_triton", variant=True))


masked_matmul = _define("masked_matmul", _masked_matmul)
packed_linear_bitmap = _define("packed_linear_bitmap", _packed_linear_bitmap)
sampled_matmul = _define("sampled_matmul", _sampled_matmul)
