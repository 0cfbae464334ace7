"""The reasons against the Triton kernels, and that asking costs no import of triton."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sapwood.triton_kernels import why_not

from sapwood import triton_kernels


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton present and compiling, whatever this process has."""
    monkeypatch.setattr(triton_kernels, "_PROBLEM", None)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)


def test_importing_the_package_does_not_import_triton() -> None:
    script = "import sys, sapwood.triton_kernels as t; t.why_not; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_kernels._installation_problem() == "triton is not installed"


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.2.0")
    problem = triton_kernels._installation_problem()
    assert problem == "needs triton 3.4 or newer, this is 3.2.0"


def test_installation_problem_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_PROBLEM", "triton is not installed")
    assert why_not("cpu", torch.float64) == "triton is not installed"


@pytest.mark.parametrize("device_type", ["cpu", "mps", "meta"])
@pytest.mark.usefixtures("installed")
def test_other_device(device_type: str) -> None:
    assert why_not(device_type, torch.float32) == "needs a CUDA device"


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "float64"), (torch.int8, "int8")], ids=["fp64", "int8"]
)
@pytest.mark.usefixtures("installed")
def test_dtype(dtype: torch.dtype, name: str) -> None:
    reason = why_not("cuda", dtype, capability=(9, 0))
    assert reason == f"takes float32, float16 and bfloat16, not {name}"


@pytest.mark.usefixtures("installed")
def test_old_capability() -> None:
    reason = why_not("cuda", torch.float16, capability=(7, 5))
    assert reason == "needs compute capability 8.0 or newer, this is 7.5"


@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (9, 0), (12, 0)])
@pytest.mark.usefixtures("installed")
def test_can_run(capability: tuple[int, int]) -> None:
    assert why_not("cuda", torch.bfloat16, capability=capability) is None


@pytest.mark.usefixtures("installed")
def test_asks_the_named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {0: SimpleNamespace(major=9, minor=0), 1: SimpleNamespace(major=7, minor=0)}
    monkeypatch.setattr("torch.cuda.get_device_properties", devices.__getitem__)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert why_not("cuda", torch.float32) is None
    reason = why_not("cuda", torch.float32, device_index=1)
    assert reason == "needs compute capability 8.0 or newer, this is 7.0"


def test_unknown_module() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_family'"):
        _ = triton_kernels.no_such_family
