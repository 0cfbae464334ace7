"""Triton kernels, one module per op family; importing this package does not import triton.

``why_not`` says whether they can run. The family modules import triton and
are therefore imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch

from ._launch import INTERPRETED

_FAMILIES = ("copruned_conv", "logsemiring", "masked_matmul", "similarity", "splat2d")

__all__ = [
    "copruned_conv",
    "logsemiring",
    "masked_matmul",
    "similarity",
    "splat2d",
    "why_not",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MINIMUM_CAPABILITY = (8, 0)
_MINIMUM_TRITON = (3, 4)


def _installation_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < _MINIMUM_TRITON:
        return f"needs triton 3.4 or newer, this is {version}"
    return None


# Read once: fixed for the life of the process, and torch.compile cannot trace the look-up.
_PROBLEM = _installation_problem()


def why_not(
    device_type: str,
    dtype: torch.dtype,
    *,
    device_index: int | None = None,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """The reason why the Triton kernels cannot run, or None when they can.

    >>> import torch
    >>> from sapwood.triton_kernels import why_not
    >>> why_not("cpu", torch.float64) is None
    False

    Args:
        device_type: ``tensor.device.type``.
        dtype: Type of the activations: float32, float16 or bfloat16.
        device_index: CUDA device to ask; default the current one.
        capability: Compute capability, instead of asking the device.

    Returns:
        A phrase for a person, or None. Only static facts are read: no tensor values, no launch.
    """
    if _PROBLEM is not None:
        return _PROBLEM
    if dtype not in _DTYPES:
        return f"takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None if device_type in ("cpu", "cuda") else "needs a CPU or CUDA device"
    if device_type != "cuda":
        return "needs a CUDA device"
    if capability is None:
        index = torch.cuda.current_device() if device_index is None else device_index
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
    if capability < _MINIMUM_CAPABILITY:
        return "needs compute capability 8.0 or newer, this is {}.{}".format(*capability)
    return None


def __getattr__(name: str) -> ModuleType:
    if name in _FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
