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
from torch import Tensor

from sapwood.reference import masked_matmul as reference
from tests.emulation import checks

ALL: tuple[checks.Shape, ...] = ((3, 17, 65), (9, 7, 130), (40, 33, 20))
REPEATED: tuple[checks.Shape, ...] = ((2, 5, 33), (11, 5, 33))


def run(ops: Any, shapes: Iterable[checks.Shape]) -> dict[str, str]:
    found: dict[str, str] = {}
    for shape in shapes:
        p = checks.problem(shape)
        _, cols, row_ptr, _ = reference.pack_csr(p.weight, p.mask)
        results: dict[str, Tensor] = {
            "csr": checks.packed_linear(ops, reference, "csr", p, activation="gelu"),
            "bitmap": checks.packed_linear(ops, reference, "bitmap", p),
            "sampled": ops.sampled_matmul(p.grad, p.x, cols, row_ptr),
            "values": ops.pack_csr(p.weight, p.mask)[0],
            "words": ops.pack_bitmap(p.weight, p.mask)[1],
            "perm": ops.transpose_csr(cols, row_ptr, p.k)[3],
        }
        for name, result in results.items():
            digest = hashlib.sha256(result.numpy().tobytes()).hexdigest()
            found[f"{name} {shape}"] = digest
    return found


if __name__ == "__main__":
    namespaces: Any = torch.ops
    namespaces.load_library(sys.argv[1])
    print(json.dumps(run(namespaces.sapwood_emu, ALL)))
