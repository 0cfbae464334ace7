"""The report on the installation: whole, broken, and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from sapwood import _load, _selftest, ops
from sapwood.cli import environment
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]
BROKEN = "sapwood: the compiled library _ops is missing; reinstall with 'pip install .'"


def test_report_names_versions_and_passes(invoke: Invoke, narrow: Narrow) -> None:
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for text in (torch.__version__, "PASS  masked_matmul", "PASS  pruning", "threads in use"):
        assert text in result.stdout
    assert narrow(result.stdout)


def test_module_gives_the_same_report_as_json() -> None:
    command = [sys.executable, "-m", "sapwood", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    assert report["torch"] == torch.__version__
    assert [test["family"] for test in report["self_test"]] == list(_selftest.FAMILIES)
    assert all(test["passed"] for test in report["self_test"])


def test_broken_install_is_reported(
    invoke: Invoke, narrow: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "ops_error", BROKEN)
    monkeypatch.setattr(_load, "native", None)
    result = invoke("info")
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert "reinstall with 'pip install .'" in " ".join(result.stdout.split())
    assert torch.__version__ in result.stdout
    assert "the module _native is missing" in " ".join(result.stdout.split())
    assert narrow(result.stdout)


def test_broken_install_as_json(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "ops_error", BROKEN)
    result = invoke("info", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ops_error"] == BROKEN
    assert report["healthy"] is False
    assert report["self_test"] == []


def test_wrong_kernel_fails_the_self_test(
    invoke: Invoke, narrow: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.packed_linear
    monkeypatch.setattr(ops, "packed_linear", lambda *arguments: 1.001 * right(*arguments))
    result = invoke("info")
    assert result.exit_code == 1
    assert "FAIL  masked_matmul" in result.stdout
    assert "PASS  pruning" in result.stdout
    assert "bitmap is off by 1.0e-03 (relative), allowed is 1e-5" in result.stdout
    assert narrow(result.stdout)


def test_kernel_that_gives_nan_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.packed_linear
    monkeypatch.setattr(ops, "packed_linear", lambda *arguments: float("nan") * right(*arguments))
    result = _selftest.run()[0]
    assert not result.passed
    assert "off by nan" in result.detail


def test_capability_limit_is_shown(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_CPU_CAPABILITY", "default")
    assert "default (SAPWOOD_CPU_CAPABILITY=default)" in invoke("info").stdout


@pytest.mark.parametrize(
    ("features", "limit", "expected"),
    [
        ([], None, "default"),
        (["avx2"], None, "default"),  # without fma the AVX2 kernels cannot run
        (["avx2", "fma"], None, "avx2"),
        (["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"], None, "avx512"),
        (["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"], "avx2", "avx2"),
        (["avx2", "fma"], "avx512", "avx2"),
        (["avx2", "fma"], "default", "default"),
    ],
)
def test_capability(features: list[str], limit: str | None, expected: str) -> None:
    assert environment.capability(features, limit) == expected


@pytest.mark.parametrize(
    ("archs", "device", "expected"),
    [
        ("", (9, 0), "none: built without CUDA"),
        ("OFF", (9, 0), "none: built without CUDA"),
        ("80;90", (8, 0), "machine code for sm_80"),
        ("80;90", (8, 9), "machine code for sm_80"),
        ("80;90", (9, 0), "machine code for sm_90"),
        ("80;90", (12, 0), "PTX for compute_90, compiled at first use"),
        ("80-real;90-real", (12, 0), "none: built for 80-real;90-real"),
        ("80-real;90-virtual", (9, 0), "PTX for compute_90, compiled at first use"),
        ("80", (7, 5), "none: built for 80"),
        ("90a", (9, 0), "machine code for sm_90"),
        ("90a", (12, 0), "none: built for 90a"),
        ("100;120", (12, 0), "machine code for sm_120"),
    ],
)
def test_code_for_a_gpu(archs: str, device: tuple[int, int], expected: str) -> None:
    assert environment.code_for(archs, *device) == expected
