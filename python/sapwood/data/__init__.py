"""Readers of the field's file formats, nothing else.

Each reader checks what it reads and raises ``ValueError`` on damage and ``MissingDataError``, which
names the file, when something is not there.
"""

from __future__ import annotations

from sapwood.data.cifar10 import load_cifar10
from sapwood.data.dataset import Dataset, MissingDataError
from sapwood.data.digits import load_digits
from sapwood.data.idx import read_idx
from sapwood.data.mnist import load_mnist

__all__ = ["Dataset", "MissingDataError", "load_cifar10", "load_digits", "load_mnist", "read_idx"]
