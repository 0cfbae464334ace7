"""The idx reader: all types, compression, and damage of every kind."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood.data import read_idx

CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}


def idx(array: np.ndarray, code: int) -> bytes:  # type: ignore[type-arg]
    return (
        bytes([0, 0, code, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


def images() -> bytes:
    return idx(np.arange(2 * 3 * 5, dtype="u1").reshape(2, 3, 5), 8)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("dtype", CODES)
def test_types(dtype: str, compressed: bool, tmp_path: Path) -> None:
    array = (np.arange(-6, 6) * 3).reshape(4, 3).astype(dtype)
    content = idx(array, CODES[dtype])
    (tmp_path / "file").write_bytes(gzip.compress(content) if compressed else content)
    read = read_idx(tmp_path / "file")
    assert read.numpy().dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(read.numpy(), array)
    read += 1  # it is ours to change


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,)])
def test_empty_and_single(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(idx(np.ones(shape, dtype="u1"), 8))
    assert torch.equal(read_idx(tmp_path / "file"), torch.ones(shape, dtype=torch.uint8))


def test_every_truncation(tmp_path: Path) -> None:
    plain, packed = images(), gzip.compress(images())
    path = tmp_path / "file"
    for content in (plain, packed):
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"read_idx: .*file must be an intact idx file"):
                read_idx(path)


def test_every_flipped_byte_of_a_compressed_file(tmp_path: Path) -> None:
    content = gzip.compress(images(), mtime=0)
    path = tmp_path / "file"
    harmless = 0
    for position in range(10, len(content)):  # the first ten bytes are time stamp and the like
        flipped = bytes([content[position] ^ 0x10])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            read = read_idx(path)
        except ValueError:
            continue
        harmless += 1  # padding behind the last deflate block carries nothing
        assert read.numpy().tobytes() == images()[16:]
    assert harmless <= 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\1\0\x08\1" + images()[4:], "magic number must name a type and a rank, got 01000801"),
        (b"\0\0\x0a\1" + images()[4:], "magic number must name a type and a rank, got 00000a01"),
        (b"\0\0\x08\0", "magic number must name a type and a rank, got 00000800"),
        (images() + b"\0", "data must end after 30 bytes, got more"),
        (b"\0\0\x08\3" + b"\xff" * 12, "sizes must give at most"),
        (b"\0\0\x08\1" + struct.pack(">I", 2**31) + b"12", "2147483648 bytes must follow, got 2"),
    ],
    ids=["magic", "type", "rank", "too-long", "huge", "lying"],
)
def test_damage(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_idx(tmp_path / "file")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing")
