"""The Triton kernel as ``sapwood::copruned_conv2d_triton``, for CUDA without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood import _register
from sapwood.ops.copruned_conv import _specs
from sapwood.ops.copruned_conv._checks import Options

# Typed loosely: mypy does not see the folder that is installed as sapwood.triton_kernels.
_kernels: Any = importlib.import_module("sapwood.triton_kernels")
_library = torch.library.Library("sapwood", "FRAGMENT")
_WITHOUT_NAMESPACE = len("sapwood::")


def why_not(x: Tensor, weight: Tensor, options: Options) -> str | None:
    """Why Triton cannot compute this convolution; None when it can."""
    if options.groups != 1:
        return f"takes groups = 1, not {options.groups}"
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    filters: Tensor | None,
    input_filters: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile: int,
    filter_group: int,
    activation: str,
) -> Tensor:
    """The op ``copruned_conv2d`` by the Triton kernel."""
    masks = (region, filters, input_filters)
    shape = (stride, padding, dilation, tile, filter_group)
    y: Tensor = _kernels.copruned_conv.copruned_conv2d(
        x, weight, bias, *masks, residual, *shape, activation
    )
    return y


def _define() -> Any:
    """An op with the schema of the compiled one; its gradient is that op's."""
    name = "copruned_conv2d"
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", convolve, "CUDA")
    spec = _register.declared()[name]
    return _register.define_op(dataclasses.replace(spec, name=f"{name}_triton", variant=True))


assert _specs.copruned_conv2d is not None  # declared before its variant
copruned_conv2d = _define()
