"""Options and fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# No measurement decides what a test runs, and nothing is written to the user's cache.
os.environ["SAPWOOD_DISPATCH"] = "builtin"

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder of real data sets")
    parser.addoption("--emulation-library", type=Path, default=None, help="the built _ops_emu.so")


def pytest_configure() -> None:
    """Lets workers end by themselves: one that is killed does not write its coverage.

    Ten seconds are not enough on a busy machine for a library with counters for every line.
    """
    manager = importlib.util.find_spec("xdist") and importlib.import_module("xdist.workermanage")
    if manager:
        manager.NodeManager.EXIT_TIMEOUT = 300


def pytest_collection_finish() -> None:
    """Drawn examples must not follow which modules a process has loaded, nor what those contain.

    Hypothesis takes up to one number in twenty from the constants of the loaded modules, and has
    no setting against it: an edit anywhere, or the tests that ran before, would change examples.
    """
    providers: Any = sys.modules.get("hypothesis.internal.conjecture.providers")
    if hasattr(providers, "_get_local_constants"):
        providers._get_local_constants = providers.Constants


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data, or a skip where a user's machine has none."""
    folder: Path | None = request.config.getoption("--data")
    if folder is None or not folder.is_dir():
        pytest.skip("real data is absent: give its folder with --data DIR")
    return folder


@pytest.fixture(scope="session")
def emulation_library(request: pytest.FixtureRequest) -> Path:
    """The CUDA kernels compiled for the host."""
    given: Path | None = request.config.getoption("--emulation-library")
    found = [given] if given else sorted((ROOT / "build" / "emu").rglob("_ops_emu*.so"))
    if not found or not found[0].is_file():
        pytest.fail("the emulation library is missing: build it with 'make emulation'")
    return found[0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
