"""The search for 32-bit index arithmetic finds what it is there for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import check_index_width
import pytest

SOURCE = """
#include <cstdint>
float product(const float* x, int row, int width) { return x[row * width]; }
int cut(int64_t size) { int cut = size; return cut; }
float wide(const float* x, int64_t row, int width) { return x[row * width]; }
"""


def test_products_and_cuts_of_32_bits_are_found(tmp_path: Path) -> None:
    tidy = shutil.which("clang-tidy") or str(Path(sys.executable).with_name("clang-tidy"))
    if not Path(tidy).is_file():
        pytest.fail("clang-tidy is missing: install the extra 'dev'")
    (tmp_path / "a.cpp").write_text(SOURCE)
    found = check_index_width.findings(tmp_path / "a.cpp", tidy)
    assert sorted(line for _, line, _ in found) == [3, 4]


def test_only_reviewed_lines_are_bounded(tmp_path: Path) -> None:
    path = check_index_width.ROOT / "csrc" / "similarity" / "kernel.h"
    lines = path.read_text().splitlines()
    at = next(i for i, text in enumerate(lines, 1) if "kStripBytes = 512 * 1024" in text)
    assert check_index_width.is_bounded(path, at)
    assert not check_index_width.is_bounded(path, at + 1)
