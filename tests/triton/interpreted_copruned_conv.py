"""The kernel on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.ops.copruned_conv import _triton
from tests.emulation import copruned_conv_checks as checks
from tests.emulation.copruned_conv_checks import PROBLEMS, Problem

NAMES = [name for name, p in PROBLEMS.items() if not p.depthwise]


class Ops:
    """The kernel's function under the name of the op."""

    copruned_conv2d: Any = staticmethod(_triton.convolve)


@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str) -> None:
    checks.check_forward(Ops, PROBLEMS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype) -> None:
    checks.check_forward(Ops, PROBLEMS["main"], dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "leaky_relu"])
def test_activations(activation: str) -> None:
    checks.check_forward(Ops, Problem(activation=activation, size=(5, 5)))


def test_more_filters_and_pixels_than_a_block_holds() -> None:
    checks.check_forward(Ops, Problem(filters=96, channels=40, size=(13, 12), tile=8, group=8))
