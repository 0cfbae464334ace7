"""The library that cross builds link against offers torch 2.10's functions, and only those."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="pyelftools (comes with auditwheel) is not installed")
import elf
import make_stub


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    output = tmp_path / "lib" / "libtorch_cpu.so"
    monkeypatch.setattr("sys.argv", ["make_stub", str(output)])
    assert make_stub.main() == 0
    return output


def link(source: str, stub: Path) -> subprocess.CompletedProcess[str]:
    """Links a library as CMakeLists.txt does: what is undefined is an error."""
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(stub.parent / "_ops.so")]
    command += ["-x", "none", str(stub), "-Wl,--no-undefined"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


def test_stub(stub: Path) -> None:
    library = elf.read(stub)
    assert library.defined == frozenset(make_stub.SHIMS.read_text().split())
    assert library.needed == ()
    assert sorted(path.name for path in stub.parent.iterdir()) == ["libtorch_cpu.so"]


def test_linking_by_soname(stub: Path) -> None:
    done = link("void aoti_torch_zero_(void); void f(void) { aoti_torch_zero_(); }", stub)
    assert done.returncode == 0, done.stderr
    assert "libtorch_cpu.so" in elf.read(stub.parent / "_ops.so").needed


def test_a_later_function_fails_to_link(stub: Path) -> None:
    """torch_from_blob came with torch 2.11."""
    done = link("void torch_from_blob(void); void f(void) { torch_from_blob(); }", stub)
    assert done.returncode != 0
    assert "torch_from_blob" in done.stderr
