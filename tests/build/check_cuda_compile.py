"""Compiles every CUDA source and fails on a warning or a register spill. Needs nvcc, but no GPU.

python tests/build/check_cuda_compile.py                 # architectures 80 and 90
python tests/build/check_cuda_compile.py --release       # all that the wheels carry
python tests/build/check_cuda_compile.py --archs 87 110
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_ARCHS = ("80", "90")
RELEASE_ARCHS = ("75", "80", "86", "87", "89", "90", "100", "110", "120")

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Report:
    """What ptxas said about one source."""

    kernels: int
    registers: int  # of the kernel that needs most
    spills: list[str]


def torch_include() -> Path:
    given = os.environ.get("SAPWOOD_TORCH_DIR")
    if given:
        return Path(given) / "include"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("check_cuda_compile: torch is not installed; set SAPWOOD_TORCH_DIR")
    return Path(spec.origin).parent / "include"


def command(source: Path, archs: list[str], output: Path, nvcc: str) -> list[str]:
    return [
        nvcc, "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2",
        "-Xcompiler", "-fPIC,-Wall", "-DTORCH_TARGET_VERSION=0x020A000000000000",
        "-I", str(ROOT / "csrc"), "-isystem", str(torch_include()),
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs),
        "-c", str(source), "-o", str(output),
    ]  # fmt: skip


def parse(log: str) -> Report:
    """Reads the lines of ``ptxas -v``; a kernel's spills follow its name."""
    report = Report(0, 0, [])
    name = ""
    for line in log.splitlines():
        if found := _KERNEL.search(line):
            name = f"{found[1]} (sm_{found[2]})"
            report.kernels += 1
        if (found := _SPILL.search(line)) and (found[1], found[2]) != ("0", "0"):
            report.spills.append(f"{name}: {found[1]} bytes stored, {found[2]} loaded")
        if found := _REGISTERS.search(line):
            report.registers = max(report.registers, int(found[1]))
    return report


def check(source: Path, archs: list[str], nvcc: str) -> bool:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(source, archs, Path(folder) / "out.o", nvcc),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    name = source.relative_to(ROOT)
    if done.returncode != 0:
        print(f"FAIL {name}: nvcc ended with {done.returncode}\n{done.stdout}")
        return False
    report = parse(done.stdout)
    if report.kernels == 0:
        print(f"FAIL {name}: ptxas reported no kernel")
        return False
    verdict = "FAIL" if report.spills else "ok"
    print(
        f"{verdict} {name}: {report.kernels} kernels for {', '.join(archs)}; "
        f"at most {report.registers} registers, {len(report.spills)} spill; {seconds:.0f} s"
    )
    for spill in report.spills:
        print(f"  {spill}")
    return not report.spills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--archs", nargs="+", default=list(DEFAULT_ARCHS), metavar="ARCH")
    parser.add_argument("--release", action="store_true", help=" ".join(RELEASE_ARCHS))
    options = parser.parse_args()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        print("check_cuda_compile: no nvcc was found (PATH, CUDACXX)", file=sys.stderr)
        return 1
    archs = list(RELEASE_ARCHS) if options.release else options.archs
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    results = [check(source, archs, nvcc) for source in sources]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
