"""Reader of the idx format (MNIST and its relatives), plain or gzip-compressed."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_TYPES: dict[int, str] = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_MOST_BYTES = 1 << 36


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Reads one idx file.

    Example:
        >>> images = read_idx("train-images-idx3-ubyte.gz")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        torch.Size([60000, 28, 28])

    Args:
        path: the file; compression is recognised by its content.

    Returns:
        A tensor of the stored shape and type (uint8, int8, int16, int32, float32 or float64).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no idx file, truncated, too long, or its compression damaged.
    """
    source = Path(path)
    with source.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        try:
            if not compressed:
                return _parse(file)
            with gzip.open(file, "rb") as plain:
                return _parse(plain)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"sapwood.data.read_idx: {source} must be an intact idx file: {error}"
            ) from None


def _parse(file: IO[bytes] | gzip.GzipFile) -> Tensor:
    magic = _exactly(file, 4)
    if magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
        raise ValueError(f"the magic number must name a type and a rank, got {magic.hex()}")
    dtype = np.dtype(_TYPES[magic[2]])
    sizes = _exactly(file, 4 * magic[3])
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    expected = math.prod(shape) * dtype.itemsize
    if expected > _MOST_BYTES:
        raise ValueError(f"the sizes must give at most {_MOST_BYTES} bytes, got {shape}")
    content = _exactly(file, expected)
    if file.read(1):
        raise ValueError(f"the data must end after {expected} bytes, got more")
    array: np.ndarray[Any, Any] = np.frombuffer(content, dtype=dtype).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))


def _exactly(file: IO[bytes] | gzip.GzipFile, size: int) -> bytes:
    """Reads in pieces, so that a lying header cannot allocate more than the file holds."""
    pieces: list[bytes] = []
    missing = size
    while missing:
        piece = file.read(min(missing, 1 << 24))
        if not piece:
            raise ValueError(f"{size} bytes must follow, got {size - missing}")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
