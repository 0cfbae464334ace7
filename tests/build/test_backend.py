"""The search for an installed torch, branch by branch, with empty directories."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is not installed")
import backend


def make_torch(directory: Path) -> Path:
    """A directory that looks like an installed torch: the one header the search asks for."""
    header = directory / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return directory / "torch"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No torch in any place of the search; a test then adds one."""
    empty = str(tmp_path / "empty")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: empty)
    monkeypatch.setattr(sys, "path", ["", empty])
    for name in ("SAPWOOD_TORCH_DIR", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)


pytestmark = pytest.mark.usefixtures("nowhere")


def test_nothing_found() -> None:
    assert backend.find_torch() is None


@pytest.mark.parametrize("scheme", ["purelib", "platlib"])
def test_prefix_of_the_interpreter(
    scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = make_torch(tmp_path / scheme)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert backend.find_torch() == str(torch)


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    torch = make_torch(tmp_path / "lib" / version / "site-packages")
    monkeypatch.setenv(variable, str(tmp_path))
    assert backend.find_torch() == str(torch)


def test_sys_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = make_torch(tmp_path / "later")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "absent"), str(tmp_path / "later")])
    assert backend.find_torch() == str(torch)


def test_environment_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed, given = make_torch(tmp_path / "installed"), make_torch(tmp_path / "given")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(installed.parent))
    monkeypatch.setenv("SAPWOOD_TORCH_DIR", str(given))
    assert backend.find_torch() == str(given)


def test_config_setting_wins_over_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given, other = make_torch(tmp_path / "given"), make_torch(tmp_path / "other")
    monkeypatch.setenv("SAPWOOD_TORCH_DIR", str(other))
    assert backend.find_torch({"cmake.define.TORCH_DIR": str(given)}) == str(given)


def test_wrong_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAPWOOD_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        backend.find_torch()
    assert str(error.value) == (f"sapwood: no include/torch/csrc/stable/library.h under {tmp_path}")


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_build_without_torch_says_what_to_do(hook: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        getattr(backend, hook)(str(tmp_path))
    assert str(error.value) == (
        "sapwood: PyTorch headers (>= 2.10) not found. Do one of these:\n"
        "  1. install torch first in this environment, then repeat;\n"
        "  2. set SAPWOOD_TORCH_DIR to the directory of an installed torch package;\n"
        "  3. pip install --no-build-isolation ."
    )


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_torch_is_required_only_when_absent(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = f"get_requires_for_build_{kind}"
    monkeypatch.setattr(backend._core, hook, lambda settings: ["cmake>=3.26"])
    assert getattr(backend, hook)() == ["cmake>=3.26", "torch>=2.10"]
    monkeypatch.setenv("SAPWOOD_TORCH_DIR", str(make_torch(tmp_path)))
    assert getattr(backend, hook)() == ["cmake>=3.26"]


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_the_build_is_told_where_torch_lies(
    hook: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = make_torch(tmp_path)
    monkeypatch.setenv("SAPWOOD_TORCH_DIR", str(torch))
    monkeypatch.setattr(backend._core, hook, lambda directory, settings, metadata: settings)
    settings = getattr(backend, hook)(str(tmp_path), {"build.verbose": "true"})
    assert settings == {"build.verbose": "true", "cmake.define.TORCH_DIR": str(torch)}
