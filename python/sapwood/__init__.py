"""Sparse, pruned and structured computation as drop-in torch ops, fast on CPU and GPU.

Submodules are imported on first use: ``sapwood.ops`` (the kernels), ``sapwood.nn`` (modules),
``sapwood.pruning`` (masks, schedules, pruners), ``sapwood.minimize`` (masked networks made small),
``sapwood.nesy`` (sentences as losses).
``python -m sapwood`` reports on the installation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sapwood import _load

if TYPE_CHECKING:
    from sapwood import data, minimize, nesy, nn, ops, pruning, reference, report
    from sapwood._backend import backend
    from sapwood._check import check_values
    from sapwood.ops._explain import explain

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "backend",
    "check_values",
    "data",
    "explain",
    "minimize",
    "nesy",
    "nn",
    "ops",
    "pruning",
    "reference",
    "report",
]

_SUBMODULES = ("data", "minimize", "nesy", "nn", "ops", "pruning", "reference", "report")
_FUNCTIONS = {
    "backend": "sapwood._backend",
    "explain": "sapwood.ops._explain",
    "check_values": "sapwood._check",
}
_native = _load.native


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"sapwood.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'sapwood' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
