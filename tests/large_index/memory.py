"""Tensors of more than 2^31 elements that take little memory, and the far ends of long launches."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops

FAR = 2**31
_NO_RESERVE = 0x4000  # Linux: pages count only when they are touched

on_linux = pytest.mark.skipif(
    sys.platform != "linux" or sys.maxsize < 2**32, reason="memory is reserved as Linux does it"
)


def reserved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    memory.madvise(mmap.MADV_HUGEPAGE)  # what is only read shares one large page of zeros
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def behind(near: Tensor) -> Tensor:
    """The same entries at the end of a tensor, more than 2^31 elements from its start."""
    rows = -(-FAR // max(1, near[0].numel()))
    far = reserved(rows + len(near), *near.shape[1:], dtype=near.dtype)
    far[rows:] = near
    return far


def apart(near: Tensor, dim: int) -> Tensor:
    """The same entries with those of ``dim`` so far apart that its last are 2^31 from its first.

    Of three entries or more, no two neighbours are: an offset is far although no stride is.
    """
    first = near.movedim(dim, 0)
    rest = first[0].contiguous()
    stride = FAR // (len(first) - 1) + 1
    memory = reserved(stride * (len(first) - 1) + rest.numel(), dtype=near.dtype)
    far = memory.as_strided(first.shape, (stride, *rest.stride())).movedim(0, dim)
    far.copy_(near)
    return far


def last_of(near: Tensor, count: int) -> Tensor:
    """``count`` entries of zeros but for the last ones, which are ``near``; contiguous."""
    far = reserved(count, *near.shape[1:], dtype=near.dtype)
    far[-len(near) :] = near
    return far


@contextmanager
def last_blocks(count: int = 1) -> Iterator[None]:
    """Every launch of an emulated kernel runs its last blocks alone."""
    os.environ["SAPWOOD_EMU_LAST_BLOCKS"] = str(count)
    try:
        yield
    finally:
        del os.environ["SAPWOOD_EMU_LAST_BLOCKS"]


@contextmanager
def alone() -> Iterator[None]:
    """Of all tests that write gigabytes, in whatever process, one runs at a time."""
    with (Path(tempfile.gettempdir()) / "sapwood-large-index.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
