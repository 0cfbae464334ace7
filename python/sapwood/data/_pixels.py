"""Images as they come from files, and the network inputs made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Pixels:
    """Images of one file, channel after channel, and their classes."""

    values: NDArray[np.uint8]  # (n, channels * height * width)
    labels: NDArray[Any]  # (n,) any integers


def first_per_class(
    parts: Sequence[Pixels], count: int, names: Sequence[str], where: str
) -> list[Pixels]:
    """The first ``count`` images of each class, in the order of the files.

    Raises:
        ValueError: if a class has fewer.
    """
    taken = np.zeros(len(names), dtype=np.int64)
    kept = []
    for part in parts:
        keep = np.zeros(len(part.labels), dtype=bool)
        for label in range(len(names)):
            rows = np.flatnonzero(part.labels == label)[: count - int(taken[label])]
            taken[label] += len(rows)
            keep[rows] = True
        kept.append(Pixels(part.values[keep], part.labels[keep]))
    fewest = int(taken.argmin())
    if taken[fewest] < count:
        raise ValueError(
            f"{where}: per_class must be at most {taken[fewest]}, the number of training images "
            f"of class {names[fewest]!r}, got {count}"
        )
    return kept


def standardised(
    parts: Sequence[Pixels], mean: Sequence[float], deviation: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Inputs (n, features) float32, scaled to [0, 1] and standardised by channel, and labels (n,).

    Works in slices, so that nothing but the result is ever held as floating point.
    """
    channels = len(mean)
    rows = sum(len(part.labels) for part in parts)
    features = parts[0].values.shape[1]
    inputs = torch.empty(rows, features)
    centre = (255.0 * torch.tensor(mean)).view(1, channels, 1)
    scale = (255.0 * torch.tensor(deviation)).view(1, channels, 1)
    start = 0
    for part in parts:
        for first in range(0, len(part.labels), _ROWS_AT_ONCE):
            values = part.values[first : first + _ROWS_AT_ONCE]
            target = inputs[start : start + len(values)]
            np.copyto(target.numpy(), values)
            target.unflatten(1, (channels, -1)).sub_(centre).div_(scale)
            start += len(values)
    labels = np.concatenate([part.labels.astype(np.int64) for part in parts])
    return inputs, torch.from_numpy(labels)
