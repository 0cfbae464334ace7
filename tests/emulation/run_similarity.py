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

from tests.emulation.similarity_checks import Shape, problem

ALL: tuple[Shape, ...] = ((70, 0, 9), (12, 70, 5))
REPEATED: tuple[Shape, ...] = ((19, 0, 6),)


def run(ops: Any, shapes: Iterable[Shape]) -> dict[str, str]:
    found: dict[str, str] = {}
    for shape in shapes:
        x, y = problem(shape)
        row, col, value, _ = ops.similarity_pairs(x, y, 0.2, "cosine", False, False, -1, True)
        values, indices = ops.similarity_topk(x, y, 4, "euclidean", False, False, True)
        labels = ops.similarity_clusters(x, 0.5, "correlation", False)
        results = {
            "row": row,
            "col": col,
            "value": value,
            "values": values,
            "indices": indices,
            "labels": labels,
        }
        for name, result in results.items():
            digest = hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()
            found[f"{name} {shape}"] = digest
    return found


if __name__ == "__main__":
    namespaces: Any = torch.ops
    namespaces.load_library(sys.argv[1])
    print(json.dumps(run(namespaces.sapwood_emu, ALL)))
