"""Every GPU kernel has its line in docs/gpu-status.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATUS = (ROOT / "docs" / "gpu-status.md").read_text()


def kernels() -> set[str]:
    cuda = [p for s in ("*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(s)]
    found = set()
    for path in cuda:
        found.update(re.findall(r"__global__[^({]*\([^)]*\)\s+(\w+)\(", path.read_text()))
    for path in (ROOT / "triton_kernels").glob("*.py"):
        found.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return found


def test_the_sources_have_kernels() -> None:
    assert {"csr_panel_kernel", "bitmap_kernel"} <= kernels()


@pytest.mark.parametrize("kernel", sorted(kernels()))
def test_kernel_is_listed(kernel: str) -> None:
    assert f"`{kernel}`" in STATUS
