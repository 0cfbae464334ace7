"""Finds and loads the compiled libraries, and remembers why it could not."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_MINIMUM_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def _load_ops() -> str | None:
    """Loads ``_ops``; returns the reason when that is impossible."""
    if _torch_version() < _MINIMUM_TORCH:
        return f"sapwood needs torch >= 2.10, found {torch.__version__}"
    spec = importlib.util.find_spec("sapwood._ops")  # in editable mode the file lies elsewhere
    if spec is None or spec.origin is None:
        return (
            "sapwood: the compiled library _ops is missing; reinstall with 'pip install .' "
            "(python -m sapwood shows what was searched)"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"sapwood: the compiled library {spec.origin} does not load: {error}"
    return None


def build_id() -> str:
    """Names the op library and the torch it runs with: what a measurement of speed holds for."""
    spec = importlib.util.find_spec("sapwood._ops")
    if spec is None or spec.origin is None:
        return f"none with torch {torch.__version__}"
    content = Path(spec.origin).read_bytes()
    return f"{hashlib.sha256(content).hexdigest()[:16]} with torch {torch.__version__}"


def _load_native() -> ModuleType | None:
    try:
        return importlib.import_module("sapwood._native")
    except ImportError:
        return None


#: Why the op library is unusable, or None when it is loaded.
ops_error: str | None = _load_ops()

#: The pybind11 module, or None when it was not built. The ops do not need it.
native: ModuleType | None = _load_native()


def require_ops() -> None:
    """Raises ImportError with the reason when the op library could not be loaded."""
    if ops_error is not None:
        raise ImportError(ops_error)
