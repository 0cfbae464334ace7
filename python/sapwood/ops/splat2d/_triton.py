"""The Triton kernels as ``sapwood::<op>_triton``, for CUDA devices without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _register
from sapwood.ops.splat2d import _specs

# Typed loosely: mypy does not see the folder that is installed as sapwood.triton_kernels.
_kernels: Any = importlib.import_module("sapwood.triton_kernels")
_library = torch.library.Library("sapwood", "FRAGMENT")
_WITHOUT_NAMESPACE = len("sapwood::")


def why_not(x: Tensor, *_: Any) -> str | None:
    """Why Triton cannot draw Gaussians of ``x``'s dtype on its device; None when it can."""
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def draw(*args: Any) -> Tensor:
    """The op ``splat2d`` by the Triton kernel."""
    image: Tensor = _kernels.splat2d.splat2d(*args)
    return image


def differentiate(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``splat2d_backward`` by the Triton kernel."""
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels.splat2d.splat2d_backward(*args)
    return grads


def _define(name: str, kernel: Callable[..., Any], **changes: Any) -> _backend.Backend:
    """An op with the schema of the compiled one."""
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", kernel, "CUDA")
    spec = dataclasses.replace(
        _register.declared()[name], name=f"{name}_triton", variant=True, **changes
    )
    return _backend.Backend("triton", why_not, _register.define_op(spec))


_GRADIENT = _define("splat2d_backward", differentiate)
_IMAGE = _define("splat2d", draw, backward=_specs.backward_by(_GRADIENT.run))


def backends(op: str) -> tuple[_backend.Backend, ...]:
    """The Triton backends of an op."""
    found = {"splat2d": _IMAGE, "splat2d_backward": _GRADIENT}.get(op)
    return () if found is None else (found,)
