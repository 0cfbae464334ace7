"""Finds index arithmetic of 32 bits in the kernels: ``python tools/check_index_width.py``.

clang-tidy reads every kernel, the CUDA ones by way of the emulation header, and reports where 64
bits are cut to 32 and where a product of 32 bits becomes an offset of 64. The products below are of
lanes, warps and sizes of tiles, which constants bound; any other finding is a fault.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = "-*,bugprone-implicit-widening-of-multiplication-result,clang-diagnostic-shorten-64-to-32"
FINDING = re.compile(r"^(?P<file>\S+?):(?P<line>\d+):\d+: (?P<kind>warning|error): (?P<what>.*)$")
#: What clang does not know of GCC's: a builtin, and vectors in an assembler constraint.
UNKNOWN = ("__builtin_shuffle", "invalid output size for constraint")

#: Of each file, what its reviewed lines contain.
BOUNDED = {
    "copruned_conv/cpu_list.h": ("kWindowBytes = 640 * 1024",),
    "copruned_conv/cuda_conv.cuh": ("first + down + p * kDown",),
    "copruned_conv/cuda_weight_grad.cuh": ("filter + across * kEach + f",),
    "copruned_conv/kernel.h": ("kWeightBytes = 18 * 1024",),
    "logsemiring/kernel_tropical.inl": ("w += V * W",),
    "masked_matmul/cuda_bitmap.cuh": ("word * 16 + 2 * lane",),
    "masked_matmul/cuda_csr.cuh": ("panel_count(batch, kWarp * L)", "+ warp * kWarp"),
    "masked_matmul/cuda_mask.cuh": ("grid_x(n * k, kThreads * kMaskPack)",),
    "masked_matmul/cuda_sampled.cuh": ("+ warp * kWarp",),
    "masked_matmul/kernel.h": ("512 * 1024 / (width * element_bytes)",),
    "masked_matmul/kernel_bitmap.inl": ("sums[b * R + r]",),
    "masked_matmul/kernel_sampled.inl": ("products[2 * i]",),
    "masked_matmul/kernel_sell.inl": ("index + 16 * v", "sums + b * kSliceRows + 16 * v"),
    "similarity/kernel.h": ("kStripBytes = 512 * 1024",),
}


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch must be installed: its headers are read")
    return Path(spec.origin).parent / "include"


def findings(source: Path, tidy: str) -> set[tuple[str, int, str]]:
    """File, line and text of every finding in what a source includes."""
    options = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include())]
    options += ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-Wshorten-64-to-32"]
    options += ["-ferror-limit=0"]
    if source.suffix == ".cu":
        options += ["-xc++", "-DSAPWOOD_EMULATE"]
    command = [tidy, "--quiet", f"--checks={CHECKS}", f"--header-filter={ROOT / 'csrc'}/.*"]
    result = subprocess.run(
        [*command, str(source), "--", *options], check=False, capture_output=True, text=True
    )
    matches = [m for line in result.stdout.splitlines() if (m := FINDING.match(line))]
    for m in matches:
        if m["kind"] == "error" and not any(known in m["what"] for known in UNKNOWN):
            sys.exit(f"clang-tidy must read {source}, got {m[0]}")
    return {(m["file"], int(m["line"]), m["what"]) for m in matches if m["kind"] == "warning"}


def is_bounded(path: Path, line: int) -> bool:
    """Whether the line is one of the reviewed ones; the emulation is no kernel."""
    name = path.relative_to(ROOT / "csrc").as_posix()
    text = path.read_text().splitlines()[line - 1]
    emulation = name in ("common/emulated_block.h", "common/emulation.h")
    return emulation or any(part in text for part in BOUNDED.get(name, ()))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    tidy = shutil.which("clang-tidy") or str(Path(sys.executable).with_name("clang-tidy"))
    if not Path(tidy).is_file():
        sys.exit("clang-tidy must be installed: pip install 'clang-tidy>=19,<20'")
    sources = sorted([*ROOT.glob("csrc/*/cpu.cpp"), *ROOT.glob("csrc/*/cuda.cu")])
    found = {f for source in sources for f in findings(source, tidy)}
    faults = sorted(f for f in found if not is_bounded(Path(f[0]), f[1]))
    for file, line, what in faults:
        print(f"{Path(file).relative_to(ROOT)}:{line}: {what}")
    bounded = len(found) - len(faults)
    print(f"{len(sources)} sources, {bounded} bounded products, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
