"""The smoke tests of a wheel refuse to judge the source tree."""

from __future__ import annotations

import check_installed
import pytest


def test_the_source_tree_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = check_installed.ROOT / "python" / "sapwood"
    monkeypatch.setattr("sapwood.__file__", str(source / "__init__.py"))
    assert check_installed.main() == 1
    assert f"sapwood must come from a wheel, got {source}" in capsys.readouterr().err
