"""The wheel check finds each fault it is there for."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="pyelftools (comes with auditwheel) is not installed")
import check_wheel
import elf

NATIVE = "sapwood/_native.cpython-311-x86_64-linux-gnu.so"
INFO = "sapwood-0.1.0.dist-info"
LICENSE = f"{INFO}/licenses/LICENSE"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small shared library that needs nothing but libc."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.c").write_text("#include <stdlib.h>\nvoid* f(void) { return malloc(1); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "a.so", "a.c"], cwd=folder, check=True)
    return (folder / "a.so").read_bytes()


@pytest.fixture
def contents(compiled: bytes) -> dict[str, bytes]:
    """The files of a wheel without fault."""
    names = [*check_wheel.REQUIRED, NATIVE, LICENSE]
    return {name: compiled if name.endswith(".so") else b"" for name in names}


HERE = f"manylinux_2_34_{platform.machine()}"


def faults(
    folder: Path, contents: dict[str, bytes], tag: str = HERE, native: bool = True
) -> list[str]:
    path = folder / f"sapwood-0.1.0-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in contents.items():
            wheel.writestr(name, data)
    return list(check_wheel.wheel_faults(path, frozenset({"aoti_torch_zero_"}), native))


@pytest.mark.parametrize(
    "tag", [HERE, f"manylinux_2_28_{platform.machine()}.linux_{platform.machine()}"]
)
def test_a_good_wheel_has_no_fault(tag: str, tmp_path: Path, contents: dict[str, bytes]) -> None:
    assert faults(tmp_path, contents, tag) == []


def test_a_wheel_without_native_says_so(tmp_path: Path, contents: dict[str, bytes]) -> None:
    del contents[NATIVE]
    assert faults(tmp_path, contents, native=False) == []
    assert faults(tmp_path, contents) == ["sapwood/_native is missing"]


@pytest.mark.parametrize("tag", ["linux_x86_64", "manylinux_2_39_x86_64", "musllinux_1_2_x86_64"])
def test_platform(tag: str, tmp_path: Path, contents: dict[str, bytes]) -> None:
    found = faults(tmp_path, contents, tag)
    assert f"the platform must be manylinux_2_34 or older, got sapwood-0.1.0-cp311-cp311-{tag}" in (
        found
    )


def test_library_of_another_machine(tmp_path: Path, contents: dict[str, bytes]) -> None:
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    assert faults(tmp_path, contents, f"manylinux_2_34_{other}") == [
        f"sapwood/_ops.so is for {platform.machine()}, the wheel for {other}",
        f"{NATIVE} is for {platform.machine()}, the wheel for {other}",
    ]


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ("triton_kernels/__init__.py", "top level must be sapwood and its dist-info"),
        ("sapwood.libs/libgomp.so.1", "got sapwood.libs"),
        ("sapwood/kernel.cu", "sapwood/kernel.cu is a source file"),
    ],
)
def test_what_must_not_be_there(
    extra: str, fault: str, tmp_path: Path, contents: dict[str, bytes], compiled: bytes
) -> None:
    found = faults(tmp_path, {**contents, extra: compiled})
    assert any(fault in line for line in found), found


@pytest.mark.parametrize("name", [*check_wheel.REQUIRED, NATIVE, LICENSE])
def test_what_must_be_there(name: str, tmp_path: Path, contents: dict[str, bytes]) -> None:
    del contents[name]
    found = faults(tmp_path, contents)
    assert len(found) == 1
    assert found[0].endswith("is missing")


def test_size(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_wheel, "MAX_BYTES", 10)
    assert faults(tmp_path, contents)[0].startswith("size must be at most 10 bytes, got ")


def library(**changes: object) -> elf.Library:
    fields = {
        "machine": "x86_64",
        "needed": ("libc.so.6",),
        "run_paths": (),
        "undefined": frozenset(),
    } | changes
    return elf.Library(defined=frozenset(), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"needed": ("libcudart.so.13",)}, "must not need libcudart.so.13"),
        ({"needed": ("libgomp.so.1",)}, "must not need libgomp.so.1"),
        ({"run_paths": ("$ORIGIN",)}, "must not have a run path, got $ORIGIN"),
        ({"undefined": frozenset({"torch_from_blob"})}, "which torch 2.10 does not have"),
        ({"undefined": frozenset({"cudaMalloc"})}, "must be linked statically"),
        ({"undefined": frozenset({"_ZN3c105Error4whatEv"})}, "outside of the stable ABI"),
        ({"undefined": frozenset({"_ZNK2at6Tensor4sizeEv"})}, "outside of the stable ABI"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_library_faults(changes: dict[str, object], fault: str) -> None:
    found = list(
        check_wheel.library_faults("sapwood/_ops.so", library(**changes), frozenset({"torch_x"}))
    )
    assert len(found) == 1
    assert fault in found[0]


def test_what_the_ops_may_need() -> None:
    needs = library(
        needed=("libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"),
        undefined=frozenset({"aoti_torch_zero_", "malloc", "_ZNSt6vectorIiE"}),
    )
    shims = frozenset({"aoti_torch_zero_"})
    assert list(check_wheel.library_faults("sapwood/_ops.so", needs, shims)) == []
    assert list(check_wheel.library_faults("sapwood/_native.so", needs, shims)) == [
        "sapwood/_native.so must not need libtorch_cpu.so"
    ]


def test_the_library_in_use_would_pass() -> None:
    """The op library of this very environment obeys the rules of the wheel."""
    spec = importlib.util.find_spec("sapwood._ops")
    assert spec is not None
    assert spec.origin is not None
    shims = frozenset(check_wheel.SHIMS.read_text().split())
    built = elf.read(Path(spec.origin))
    assert list(check_wheel.library_faults("sapwood/_ops.so", built, shims)) == []


def test_elf_refuses_a_static_object(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int a;\n")
    subprocess.run(["cc", "-c", "a.c"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="not a shared library"):
        elf.read(tmp_path / "a.o")
