"""How the families launch their kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: Whether kernels run in Triton's interpreter, on CPU tensors too; triton reads the flag at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

#: Turns a kernel into what is launched; ``torch.library.wrap_triton`` inside a ``triton_op``.
Wrap = Callable[[Any], Any]

#: A kernel, its argument types, its constants and its compiler options.
AotCase = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


class Config(NamedTuple):
    """Tile sizes as the kernel's constexpr arguments, and the two compiler options."""

    tile: dict[str, int]
    num_warps: int
    num_stages: int


def cdiv(a: int, b: int) -> int:
    """Rounds ``a / b`` up; works on symbolic sizes."""
    return -(-a // b)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: Config,
    wrap: Wrap | None,
    args: tuple[Any, ...],
    **constants: Any,
) -> None:
    """Launches ``kernel`` on the device of ``args[0]``, with every compiler option stated.

    The kernels write ``tl.fma`` where they mean it. torch's wrapper does not accept the fusion
    option; there the default, which differs between Triton versions, can change the last bit of
    an activation function and nothing else.
    """
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with torch.cuda.device(args[0].get_device()):  # triton takes the current one; -1 is a no-op
        if wrap is None or INTERPRETED:  # wrap_triton refuses interpreted kernels
            kernel[grid](*args, **constants, **config.tile, **options, enable_fp_fusion=False)
        else:
            wrap(kernel)[grid](*args, **constants, **config.tile, **options)
