"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under a temporary name in the same folder, then renames it.

    A reader sees the old content or the new, never a part; an interrupted write leaves nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write_bytes(Path(folder) / "a.bin", b"sap")
    ...     Path(folder, "a.bin").read_bytes()
    b'sap'

    Args:
        path: the file to write; its folder must exist.
        content: the whole content.

    Raises:
        OSError: when the folder is missing or not writable.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: str | os.PathLike[str], content: str) -> None:
    """Writes a text file as UTF-8 under a temporary name in the same folder, then renames it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write_text(Path(folder) / "a.txt", "sap")
    ...     Path(folder, "a.txt").read_text()
    'sap'

    Args:
        path: the file to write; its folder must exist.
        content: the whole content.

    Raises:
        OSError: when the folder is missing or not writable.
    """
    atomic_write_bytes(path, content.encode("utf-8"))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors (on the CPU) of a safetensors file.

    >>> import tempfile, safetensors.torch, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.safetensors"
    ...     atomic_write_bytes(file, safetensors.torch.save({"a": torch.ones(2)}))
    ...     read_tensors(file)
    ({}, {'a': tensor([1., 1.])})

    Args:
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), framework="pt") as file:
            return file.metadata() or {}, {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - it is no mapping
            }
    # what the library and torch raise for headers that no writer makes
    except (SafetensorError, RuntimeError, TypeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{error}") from None


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Collects several files in a temporary folder and moves them into place when all are written.

    When the block raises, nothing appears in ``folder``. The files move in the order of their
    names, each by an atomic rename.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with staged(Path(home) / "out") as stage:
    ...         _ = (stage / "a.txt").write_text("sap")
    ...     sorted(file.name for file in Path(home, "out").iterdir())
    ['a.txt']

    Args:
        folder: the destination; created when missing.

    Yields:
        The temporary folder, inside ``folder`` so that the renames stay on one file system.

    Raises:
        OSError: when the destination cannot be created or written.
    """
    destination = Path(folder)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staged-", dir=destination) as name:
        stage = Path(name)
        yield stage
        for file in sorted(stage.iterdir()):
            file.replace(destination / file.name)
