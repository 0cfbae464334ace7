"""Runs the emulated ops and prints a digest of every result, for comparisons between processes.

Two emulation libraries cannot be loaded into one process: both define the same ops.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch

from tests.emulation.copruned_conv_checks import PROBLEMS

ALL = ("one-by-one", "dilated", "depthwise-stride")
REPEATED = ("one-by-one",)


def run(ops: Any, names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        p = PROBLEMS[name]
        x, weight, *rest = p.tensors(torch.float32, "cpu")
        y = ops.copruned_conv2d(x, weight, *rest, *p.options, p.activation)
        needs = (True, True, True)
        grads = ops.copruned_conv2d_backward(y, x, weight, *rest[1:4], *p.options, *needs)
        for part, result in zip(("y", "x", "weight", "bias"), (y, *grads), strict=True):
            digest = hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()
            found[f"{name} {part}"] = digest
    return found


if __name__ == "__main__":
    namespaces: Any = torch.ops
    namespaces.load_library(sys.argv[1])
    print(json.dumps(run(namespaces.sapwood_emu, ALL)))
