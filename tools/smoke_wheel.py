"""Runs one wheel in several environments, each with a torch of its own.

    python tools/smoke_wheel.py dist/*.whl --python ENV1/bin/python --python ENV2/bin/python

The wheel is unpacked into a temporary folder and the environments stay as they are. Each must have
torch, numpy and safetensors, and no editable sapwood, which would be imported in its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOKE = """
import torch
import sapwood

torch.manual_seed(0)
x, w, bias = torch.randn(16, 96), torch.randn(48, 96, requires_grad=True), torch.randn(48)
mask = torch.rand(48, 96) > 0.8
dense = torch.nn.functional.linear(x, torch.where(mask, w, 0), bias)
y = sapwood.ops.masked_matmul(x, w, mask, bias)
torch.testing.assert_close(y, dense)
grad, = torch.autograd.grad(y.square().sum(), w)
expected, = torch.autograd.grad(dense.square().sum(), w)
torch.testing.assert_close(grad, expected)
for format in ("dense", "bitmap", "csr", "sell"):
    packed = sapwood.ops.pack_sparse(w.detach(), mask, format=format)
    torch.testing.assert_close(sapwood.ops.packed_linear(x, packed, bias), dense.detach())
    assert torch.equal(sapwood.ops.unpack(packed), torch.where(mask, w.detach(), 0))
print("ok: torch", torch.__version__, "built with", sapwood._native.build_report()["torch_headers"])
"""


def main() -> int:
    """Prints one line per environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", type=Path, action="append", required=True)
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(arguments.wheel).extractall(folder)
        environment = {**os.environ, "PYTHONPATH": folder, "SAPWOOD_DISPATCH": "builtin"}
        for python in arguments.python:
            command = [str(python), "-c", SMOKE]
            failed |= subprocess.run(command, cwd=folder, env=environment).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
