"""CIFAR-10 from a zip of JPEGs, the binary version or the Python version."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sapwood.data._batch_files import read_binary_batch, read_python_batch
from sapwood.data._jpeg_archive import read_jpeg_archive
from sapwood.data._pixels import Pixels, first_per_class, standardised
from sapwood.data.dataset import Dataset, MissingDataError

#: The classes, in the order of their labels.
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
ARCHIVE = "cifar10_jpeg.zip"
PYTHON_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
BINARY_FILES = tuple(f"{name}.bin" for name in PYTHON_FILES)
_SUBFOLDERS = {"binary": "cifar-10-batches-bin", "Python": "cifar-10-batches-py"}
_SHAPE = (3, 32, 32)
# of the training pixels of each channel, scaled to [0, 1]; the figures that everybody uses
_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2470, 0.2435, 0.2616)
_WHERE = "sapwood.data.load_cifar10"


def load_cifar10(path: str | os.PathLike[str], *, per_class: int | None = None) -> Dataset:
    """Reads CIFAR-10, whichever form it has.

    Nothing is executed, unpacked or downloaded. JPEG copies of the data are lossy: accuracies
    measured on them are not comparable with published ones.

    Example::

        data = load_cifar10("cifar-10-batches-bin")
        data.train_inputs.shape  # (50000, 3072)
        data.train_images.shape  # (50000, 3, 32, 32)

    Args:
        path: one of

            - a zip of JPEGs, ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (needs Pillow);
            - a folder of the binary version, ``data_batch_1.bin`` to ``data_batch_5.bin`` and
              ``test_batch.bin``, or one that holds it as ``cifar-10-batches-bin``;
            - a folder of the Python version, ``data_batch_1`` to ``data_batch_5`` and
              ``test_batch``, or one that holds it as ``cifar-10-batches-py``; these files are
              pickles, of which only the opcodes of a dictionary with an array are understood;
            - a folder that holds ``cifar10_jpeg.zip``.
        per_class: take only the first so many training images of each class, in the order of the
            files; the names of JPEGs are sorted. All test images are read in any case.

    Returns:
        Pixels standardised by channel with CIFAR-10's usual mean and deviation, channel after
        channel, and labels 0 to 9 in the alphabetical order of the classes. The files may hold any
        number of images; ``source`` says how many there were.

    Raises:
        MissingDataError: when a file is not there; the message names it.
        ModuleNotFoundError: when there is a zip of JPEGs, but no Pillow.
        ValueError: when a file is damaged, holds or does anything else, or has fewer images.
        TypeError: when ``per_class`` is no integer.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    _require_count(per_class)
    source = Path(path)
    if source.is_dir():
        kind, folder = _recognise(source)
        if kind != "JPEG":
            return _from_batches(kind, folder, per_class)
        source = folder / ARCHIVE
    elif not source.is_file():
        raise MissingDataError(f"{_WHERE}: {source} does not exist")
    train, test = read_jpeg_archive(source, CLASSES, _SHAPE[1:], per_class, _WHERE)
    return _dataset("lossy JPEG copies", [train], [test])


def _require_count(per_class: int | None) -> None:
    if per_class is None:
        return
    if isinstance(per_class, bool) or not isinstance(per_class, int):
        raise TypeError(f"{_WHERE}: per_class must be an integer or None, got {per_class!r}")
    if per_class < 1:
        raise ValueError(f"{_WHERE}: per_class must be at least 1, got {per_class}")


def _recognise(folder: Path) -> tuple[str, Path]:
    """The version that a folder holds, and where."""
    for kind, files in (("binary", BINARY_FILES), ("Python", PYTHON_FILES)):
        for place in (folder, folder / _SUBFOLDERS[kind]):
            if any((place / name).is_file() for name in files):
                return kind, place
    if (folder / ARCHIVE).is_file():
        return "JPEG", folder
    raise MissingDataError(
        f"{_WHERE}: {folder / BINARY_FILES[0]} does not exist, nor does {PYTHON_FILES[0]} or "
        f"{ARCHIVE}"
    )


def _from_batches(kind: str, folder: Path, per_class: int | None) -> Dataset:
    files, reader = {
        "binary": (BINARY_FILES, read_binary_batch),
        "Python": (PYTHON_FILES, read_python_batch),
    }[kind]
    parts = [_read(reader, folder / name) for name in files]
    train, test = parts[:-1], parts[-1:]
    if per_class is not None:
        train = first_per_class(train, per_class, CLASSES, _WHERE)
    return _dataset(f"{kind} version", train, test)


def _read(reader: Callable[[Path], Pixels], path: Path) -> Pixels:
    if not path.is_file():
        raise MissingDataError(f"{_WHERE}: {path} does not exist")
    try:
        return reader(path)
    except ValueError as error:
        reason = str(error)[:200]
        raise ValueError(f"{_WHERE}: {path} must be an intact batch file: {reason}") from None


def _dataset(version: str, train: list[Pixels], test: list[Pixels]) -> Dataset:
    train_inputs, train_labels = standardised(train, _MEAN, _DEVIATION)
    test_inputs, test_labels = standardised(test, _MEAN, _DEVIATION)
    return Dataset(
        name="cifar10",
        source=f"CIFAR-10, {version}, {len(train_labels)} + {len(test_labels)} images",
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        classes=len(CLASSES),
        image_shape=_SHAPE,
    )
