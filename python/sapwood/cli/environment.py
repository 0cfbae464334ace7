"""What is installed and on what it runs, as plain data for reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_ISA = ("default", "avx2", "avx512")
_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma"},
}


def describe() -> dict[str, Any]:
    """Gathers versions, build, CPU, threads and GPUs; needs nothing that was compiled."""
    import torch

    from sapwood import __version__, _load
    from sapwood._measure import cpu_name

    build = None if _load.native is None else dict(_load.native.build_report())
    features = [] if _load.native is None else list(_load.native.cpu_features())
    return {
        "sapwood": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "model": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": features,
            "capability": capability(features, os.environ.get("SAPWOOD_CPU_CAPABILITY")),
            "capability_limit": os.environ.get("SAPWOOD_CPU_CAPABILITY"),
        },
        "build": build,
        "ops_error": _load.ops_error,
        "gpus": _gpus("" if build is None else str(build["cuda_archs"])),
    }


def capability(features: list[str], limit: str | None) -> str:
    """The instruction set the kernels use: the best this CPU has, up to ``limit``.

    >>> capability(["avx2", "fma"], None), capability(["avx2", "fma"], "default")
    ('avx2', 'default')
    """
    best = next((isa for isa in ("avx512", "avx2") if _NEEDS[isa] <= set(features)), "default")
    if limit not in _ISA:
        return best
    return min(best, limit, key=_ISA.index)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(archs: str) -> list[dict[str, str]]:
    """Each GPU that torch sees, and what the binary holds for it."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "arch": f"sm_{major}{minor}",
                "code": code_for(archs, major, minor),
            }
        )
    return found


def code_for(archs: str, major: int, minor: int) -> str:
    """What a binary built for ``archs`` (CMake's list) can do on a compute capability.

    >>> code_for("80;90", 8, 6), code_for("80-real", 9, 0)
    ('machine code for sm_80', 'none: built for 80-real')
    """
    entries = [entry for entry in archs.replace(";", " ").split() if entry[:2].isdigit()]
    if not entries:
        return "none: built without CUDA"
    ptx = None
    for entry in entries:
        number = int("".join(c for c in entry.partition("-")[0] if c.isdigit()))
        exact_only = entry.partition("-")[0][-1].isalpha()  # 90a runs on 9.0 alone
        fits = divmod(number, 10)[0] == major and number % 10 <= minor
        if exact_only:
            fits = number == 10 * major + minor
        if fits and not entry.endswith("-virtual"):
            return f"machine code for sm_{number}"
        if not exact_only and not entry.endswith("-real") and number <= 10 * major + minor:
            ptx = number
    if ptx is not None:
        return f"PTX for compute_{ptx}, compiled at first use"
    return f"none: built for {archs}"
