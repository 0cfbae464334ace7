"""Fresh caches for every test, and a stopwatch that stands still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sapwood.ops import _calibrate, _dispatch
from sapwood.ops._cost_model import DispatchTable, Key
from tests.dispatch.tables import table


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every test starts with empty caches, and writes below its own folder only."""
    monkeypatch.setattr(_dispatch, "_memory", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setenv("SAPWOOD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SAPWOOD_DISPATCH", raising=False)
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Replaces the stopwatch; lists what was measured."""
    keys: list[Key] = []

    def measure(key: Key, dtype: torch.dtype, *, seconds: float) -> tuple[DispatchTable, float]:
        assert torch.get_num_threads() == key.threads
        keys.append(key)
        return table(key=key), 0.01

    monkeypatch.setattr(_calibrate, "measure", measure)
    return keys
