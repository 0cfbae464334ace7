"""Checks what a wheel of sapwood contains and what its libraries need.

    python tools/check_wheel.py dist/*.whl

Prints one line a wheel; every fault is a line of its own and makes the exit code 1. Of torch the
libraries may need nothing but functions of torch 2.10, whatever torch they were built with.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import elf

MAX_BYTES = 15 * 1024 * 1024
REQUIRED = (
    "sapwood/__init__.py",
    "sapwood/_native.pyi",
    "sapwood/_ops.so",
    "sapwood/py.typed",
    "sapwood/triton_kernels/__init__.py",
)
#: The oldest glibc a wheel may ask for is that of Debian 12's libraries: manylinux_2_34.
PLATFORM = re.compile(r"manylinux_2_(\d+)_(x86_64|aarch64)")
MAX_GLIBC = 34
NATIVE = re.compile(r"sapwood/_native\.cpython-\w+-[\w-]+\.so")
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".inl")
#: The system's own libraries. The loader is ld-linux-x86-64.so.2 or ld-linux-aarch64.so.1.
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
TORCH = "libtorch_cpu.so"
#: Mangled names of torch's C++ namespaces c10, at and torch, which promise no stability.
UNSTABLE = re.compile(r"_Z\w*?N?K?(3c10|2at|5torch)\d")
SHIMS = Path(__file__).resolve().parent.parent / "tests" / "build" / "shim_2_10.txt"


def library_faults(name: str, library: elf.Library, shims: frozenset[str]) -> Iterator[str]:
    """Faults of one shared library inside the wheel."""
    allowed = (TORCH,) if name == "sapwood/_ops.so" else ()
    for needed in library.needed:
        if needed not in allowed and not SYSTEM.fullmatch(needed):
            yield f"{name} must not need {needed}"
    for path in library.run_paths:
        yield f"{name} must not have a run path, got {path}"
    for symbol in sorted(library.undefined):
        if symbol.startswith(("aoti_torch_", "torch_")) and symbol not in shims:
            yield f"{name} needs {symbol}, which torch 2.10 does not have"
        elif UNSTABLE.match(symbol):
            yield f"{name} needs {symbol}, which is outside of the stable ABI"
        elif symbol.startswith("cuda"):
            yield f"{name} needs {symbol} of the CUDA runtime, which must be linked statically"


def wheel_faults(path: Path, shims: frozenset[str], native: bool = True) -> Iterator[str]:
    """Everything that is wrong with one wheel, in words."""
    platforms = [p for p in map(PLATFORM.fullmatch, path.stem.split("-")[-1].split(".")) if p]
    machines = {platform[2] for platform in platforms}
    if not platforms or min(int(platform[1]) for platform in platforms) > MAX_GLIBC:
        yield f"the platform must be manylinux_2_{MAX_GLIBC} or older, got {path.stem}"
    if path.stat().st_size > MAX_BYTES:
        yield f"size must be at most {MAX_BYTES} bytes, got {path.stat().st_size}"
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        info = re.compile(r"sapwood-[^/-]+\.dist-info")
        for top in sorted({name.split("/")[0] for name in names}):
            if top != "sapwood" and not info.fullmatch(top):
                yield f"top level must be sapwood and its dist-info, got {top}"
        for name in REQUIRED:
            if name not in names:
                yield f"{name} is missing"
        if native and not any(map(NATIVE.fullmatch, names)):
            yield "sapwood/_native is missing"
        if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
            yield "the licence is missing"
        for name in names:
            if name.endswith(SOURCES):
                yield f"{name} is a source file"
            elif name.endswith(".so"):
                library = elf.read(wheel.read(name))
                for machine in machines - {library.machine}:
                    yield f"{name} is for {library.machine}, the wheel for {machine}"
                yield from library_faults(name, library, shims)


def main() -> int:
    """Checks the wheels named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--without-native", action="store_true", help="the ops are all of it")
    arguments = parser.parse_args()
    shims = frozenset(SHIMS.read_text().split())
    failed = False
    for path in arguments.wheels:
        faults = list(wheel_faults(path, shims, not arguments.without_native))
        failed |= bool(faults)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {len(faults)} faults")
        print("".join(f"  {fault}\n" for fault in faults), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
