"""The file that keeps measured dispatch tables: broken, foreign, old, unwritable."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood.ops import _dispatch
from sapwood.ops._cost_model import Key


def spoil(text: str) -> None:
    _dispatch.cache_file().parent.mkdir(parents=True, exist_ok=True)
    _dispatch.cache_file().write_text(text)


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ("", "Expecting value"),
        ('{"layout": 1, "tables"', "Expecting"),
        ("[" * 100_000, "recursion"),
        ("null", "does not hold a list of tables"),
        ({"cpu": "another"}, "its cpu is 'another'"),
        ({"version": "0.0.1"}, "its version is '0.0.1'"),
        ({"layout": 99}, "its layout is 99"),
        ({"tables": [{}]}, "layout must be 1, got None"),
    ],
    ids=["empty", "truncated", "deep", "null", "cpu", "version", "layout", "table"],
)
def test_a_foreign_or_broken_file_is_measured_anew_with_one_warning(
    spoiled: str | dict[str, Any], reason: str, measured: list[Key]
) -> None:
    _dispatch.calibrate()
    original = json.loads(_dispatch.cache_file().read_text())
    spoil(spoiled if isinstance(spoiled, str) else json.dumps({**original, **spoiled}))
    _dispatch._memory.clear()
    with pytest.warns(UserWarning, match=f"ignoring the dispatch cache .*{reason}") as caught:
        assert _dispatch.table_for("cpu", torch.float32).source == "calibrated"
    assert len(caught) == 1
    assert len(measured) == 2
    assert json.loads(_dispatch.cache_file().read_text()) == original


def test_another_build_is_measured_anew_in_silence(measured: list[Key]) -> None:
    """Kernels or torch have changed, and with them every time: nothing is wrong with the file."""
    _dispatch.calibrate()
    original = json.loads(_dispatch.cache_file().read_text())
    spoil(json.dumps({**original, "build": "another"}))
    _dispatch._memory.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _dispatch.table_for("cpu", torch.float32)
    assert len(measured) == 2
    assert json.loads(_dispatch.cache_file().read_text()) == original


def test_an_oversized_file_is_not_read(
    measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "_LARGEST_FILE", 10)
    spoil("x" * 11)
    with pytest.warns(UserWarning, match="larger than 10 bytes"):
        _dispatch.table_for("cpu", torch.float32)


def test_an_unwritable_cache_keeps_the_table_in_memory_with_one_warning(
    measured: list[Key], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAPWOOD_CACHE_DIR", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = _dispatch.calibrate()
        _dispatch.calibrate(dtype=torch.float64)
    assert len(caught) == 1
    assert "kept in memory only" in str(caught[0].message)
    assert _dispatch.table_for("cpu", torch.float32) is first


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    _dispatch.calibrate()
    before = _dispatch.cache_file().read_text()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.warns(UserWarning, match="disk full"):
        _dispatch.calibrate(dtype=torch.float64)
    assert list(_dispatch.cache_file().parent.iterdir()) == [_dispatch.cache_file()]
    assert _dispatch.cache_file().read_text() == before
