"""Peak memory of one provider, measured in a process that runs nothing else.

On the CPU: growth of the resident set over that of the imported packages, the peak reset once
everything is built (so the dense weight that packing starts from does not count). On a GPU: the
allocator's own statistics.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sapwood.cli.benchmarks.runner import Case

_MIB = 1 << 20


def in_child(case: Case, provider: str) -> float | None:
    """Peak in MiB while the provider runs; None where the system does not tell."""
    if not dataclasses.is_dataclass(case) or isinstance(case, type):
        return None
    kind = type(case)
    described = (kind.__module__, kind.__name__, json.dumps(dataclasses.asdict(case)))
    command = (sys.executable, __file__, *described, provider, str(torch.get_num_threads()))
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    value = json.loads(output)
    return None if value is None else float(value)


def measure(case: Case, provider: str) -> float | None:
    if case.device == "cuda":
        return _measure_cuda(case, provider)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    before = _kib(status, "VmRSS")
    call = case.build(provider)
    call()
    _family(case).problem_of.cache_clear()
    gc.collect()
    reset.write_text("5")  # sets the peak back to the present size
    call()
    return (_kib(status, "VmHWM") - before) / 1024


def _measure_cuda(case: Case, provider: str) -> float:
    call = case.build(provider)
    call()
    _family(case).problem_of.cache_clear()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / _MIB


def _kib(status: Path, field: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _family(case: Case) -> Any:
    """The module of the case, which also holds its problem."""
    return importlib.import_module(type(case).__module__)


def main(module: str, kind: str, description: str, provider: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    case = getattr(importlib.import_module(module), kind)(**json.loads(description))
    print(json.dumps(measure(case, provider)))


if __name__ == "__main__":
    main(*sys.argv[1:])
