"""The two ways in which a compiled op runs here, and room for those that fill memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .memory import alone


@pytest.fixture
def emulated(emulation_library: Path) -> Any:
    """The CUDA kernels compiled for the CPU."""
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@pytest.fixture(params=["cpu", "emulated"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The ops of the CPU, and the CUDA kernels compiled for it."""
    if request.param == "cpu":
        return torch.ops.sapwood
    return request.getfixturevalue("emulated")


@pytest.fixture
def room() -> Iterator[None]:
    """For a test that writes gigabytes."""
    with alone():
        yield
