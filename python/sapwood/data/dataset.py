"""What every reader returns, and how it says that files are missing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Inputs and class labels, split for training and testing."""

    name: str
    source: str
    train_inputs: Tensor  # (n, features) float32
    train_labels: Tensor  # (n,) int64
    test_inputs: Tensor  # (m, features) float32
    test_labels: Tensor  # (m,) int64
    classes: int

    @property
    def features(self) -> int:
        return self.train_inputs.shape[1]


class MissingDataError(FileNotFoundError):
    """A data file that should be there is not; the message names it."""
