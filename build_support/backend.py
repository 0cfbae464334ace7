"""PEP 517 backend: scikit-build-core, told where the already installed torch lies.

torch is not a build requirement, because an isolated build environment would then download the
newest CUDA build (gigabytes) and compile against that one. Any torch >= 2.10 will do: the op
library uses only libtorch's stable ABI, so this file merely has to find the headers.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scikit_build_core import build as _core
from scikit_build_core.build import *  # noqa: F403  sdist and metadata hooks unchanged

_HEADER = Path("include/torch/csrc/stable/library.h")
_NOT_FOUND = """\
sapwood: PyTorch headers (>= 2.10) not found. Do one of these:
  1. install torch first in this environment, then repeat;
  2. set SAPWOOD_TORCH_DIR to the directory of an installed torch package;
  3. pip install --no-build-isolation ."""

Settings = dict[str, Any] | None


def _site_dirs() -> Iterator[str]:
    yield sysconfig.get_path("purelib")  # pip's isolation keeps the environment's prefix
    yield sysconfig.get_path("platlib")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # pypa/build and uv isolate elsewhere
        if os.environ.get(name):
            yield str(Path(os.environ[name], "lib", version, "site-packages"))
    yield from filter(None, sys.path)


def find_torch(settings: Settings = None) -> str | None:
    """Directory of the torch package whose headers the build will use, or None."""
    given = (settings or {}).get("cmake.define.TORCH_DIR") or os.environ.get("SAPWOOD_TORCH_DIR")
    for candidate in [given] if given else [Path(d, "torch") for d in _site_dirs()]:
        if (Path(candidate) / _HEADER).is_file():
            return str(candidate)
    if given:
        raise SystemExit(f"sapwood: no {_HEADER} under {given}")
    return None


def _with_torch(settings: Settings) -> dict[str, Any]:
    torch = find_torch(settings)
    if torch is None:
        raise SystemExit(_NOT_FOUND)
    return {**(settings or {}), "cmake.define.TORCH_DIR": torch}


def _requires(requirements: list[str], settings: Settings) -> list[str]:
    return requirements + ([] if find_torch(settings) else ["torch>=2.10"])


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requires(_core.get_requires_for_build_wheel(config_settings), config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requires(_core.get_requires_for_build_editable(config_settings), config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _core.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _core.build_editable(wheel_directory, _with_torch(config_settings), metadata_directory)
