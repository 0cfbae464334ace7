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

from tests.emulation.splat2d_checks import CUTOFF, Shape, image_grad, problem

ALL: tuple[Shape, ...] = ((2, 35, 3, 33, 20), (1, 40, 5, 17, 18))
REPEATED: tuple[Shape, ...] = ((1, 30, 3, 18, 17),)


def run(ops: Any, shapes: Iterable[Shape]) -> dict[str, str]:
    found: dict[str, str] = {}
    for shape in shapes:
        scene = problem(shape)
        args = (scene.mu, scene.chol, scene.feat, None)
        results = [ops.splat2d(*args, *scene.size, CUTOFF)]
        results += ops.splat2d_backward(image_grad(scene), *args, CUTOFF, True)
        results.append(ops.splat2d_pairs(scene.mu, scene.chol, None, *scene.size, CUTOFF))
        for at, result in enumerate(results):
            digest = hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()
            found[f"{at} {shape}"] = digest
    return found


if __name__ == "__main__":
    namespaces: Any = torch.ops
    namespaces.load_library(sys.argv[1])
    print(json.dumps(run(namespaces.sapwood_emu, ALL)))
