"""MNIST from its four idx files, gzipped or not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sapwood.data.dataset import Dataset, MissingDataError
from sapwood.data.idx import read_idx

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MEAN, _DEVIATION = 0.1307, 0.3081  # of the training pixels, scaled to [0, 1]


def load_mnist(folder: str | os.PathLike[str]) -> Dataset:
    """Reads MNIST, or any data set of the same four files, from a folder.

    Example::

        data = load_mnist("mnist")
        data.train_inputs.shape  # (60000, 784)

    Args:
        folder: holds the files ``train-images-idx3-ubyte`` and so on, plain or ending in ``.gz``.

    Returns:
        Pixels standardised by MNIST's mean and deviation, row-major, and labels 0 to 9.

    Raises:
        MissingDataError: when a file is not there; the message names it.
        ValueError: when a file is damaged, or images and labels do not belong together.
    """
    parts = [torch.as_tensor(read_idx(_find(Path(folder), name))) for name in FILES]
    for images, labels in (parts[0:2], parts[2:4]):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            raise ValueError(
                "sapwood.load_mnist: images and labels must have shapes (n, height, width) and "
                f"(n,), got {shapes}"
            )
    x_train, y_train, x_test, y_test = parts
    return Dataset(
        name="mnist",
        source="MNIST idx files",
        train_inputs=_standardised(x_train),
        train_labels=y_train.long(),
        test_inputs=_standardised(x_test),
        test_labels=y_test.long(),
        classes=10,
        image_shape=(1, x_train.shape[1], x_train.shape[2]),
    )


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise MissingDataError(f"sapwood.load_mnist: {folder / name}.gz does not exist")


def _standardised(images: torch.Tensor) -> torch.Tensor:
    """(n, height, width) uint8 -> (n, height * width) float32."""
    return images.flatten(1).float().div_(255.0).sub_(_MEAN).div_(_DEVIATION)
