"""CIFAR-10's batch files, binary and of the Python version."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sapwood.data._opcodes import read_dictionary
from sapwood.data._pixels import Pixels

PIXELS = 3 * 32 * 32
CLASSES = 10
_MOST_BYTES = 1 << 28  # the published files have 31 million


def read_binary_batch(path: Path) -> Pixels:
    """Records of one label byte and the pixels, channel after channel.

    Raises:
        ValueError: if the file is damaged.
    """
    content = _read(path)
    if not content or len(content) % (1 + PIXELS):
        raise ValueError(f"the size must be a multiple of {1 + PIXELS} bytes, got {len(content)}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return _checked(Pixels(records[:, 1:], records[:, 0]))


def read_python_batch(path: Path) -> Pixels:
    """A dictionary with ``data``, bytes (n, 3072), and ``labels``, a list of n integers.

    Raises:
        ValueError: if the file is damaged, or holds or does anything else.
    """
    batch = read_dictionary(_read(path))
    values, labels = batch.get("data"), batch.get("labels")
    if not isinstance(values, np.ndarray) or values.shape[1] != PIXELS or not len(values):
        raise ValueError(f"the entry 'data' must be an array of bytes (n, {PIXELS})")
    if type(labels) is not list or len(labels) != len(values):
        raise ValueError(f"the entry 'labels' must be a list of {len(values)} labels")
    if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise ValueError(f"all labels must be integers from 0 to {CLASSES - 1}")
    return Pixels(values, np.array(labels, dtype=np.int64))


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"the size must be at most {_MOST_BYTES} bytes, got {size}")
    return path.read_bytes()


def _checked(part: Pixels) -> Pixels:
    if (part.labels >= CLASSES).any():
        raise ValueError(f"all labels must be below {CLASSES}, got {part.labels.max()}")
    return part
