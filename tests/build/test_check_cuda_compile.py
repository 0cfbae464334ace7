"""The reader of ptxas' output: a spill must not pass."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CLEAN = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
SPILLED = CLEAN.replace("'_Z1fv'", "'_Z1gv'").replace("0 bytes spill loads", "8 bytes spill loads")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).with_name("check_cuda_compile.py")
    spec = importlib.util.spec_from_file_location("check_cuda_compile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_clean_output_has_no_spills(script: ModuleType) -> None:
    assert script.parse(CLEAN) == script.Report(1, 40, [])


def test_spills_are_named(script: ModuleType) -> None:
    report = script.parse(CLEAN + SPILLED)
    assert report.kernels == 2
    assert report.spills == ["_Z1gv (sm_80): 0 bytes stored, 8 loaded"]


def test_every_release_architecture_is_asked_of_nvcc(script: ModuleType) -> None:
    line = script.command(Path("a.cu"), list(script.RELEASE_ARCHS), Path("a.o"), "nvcc")
    for arch in ("75", "80", "86", "87", "89", "90", "100", "110", "120"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in line
    assert line[line.index("-Werror") + 1] == "all-warnings"
