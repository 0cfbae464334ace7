"""What every reader returns, and how it says that files are missing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Inputs and class labels, split for training and testing.

    Inputs are flat. Where they are images, ``image_shape`` says how to see them as such, and
    ``train_images`` and ``test_images`` do, without a copy.
    """

    name: str
    source: str
    train_inputs: Tensor  # (n, features) float32
    train_labels: Tensor  # (n,) int64
    test_inputs: Tensor  # (m, features) float32
    test_labels: Tensor  # (m,) int64
    classes: int
    image_shape: tuple[int, int, int] | None = None  # (channels, height, width)

    @property
    def features(self) -> int:
        """Numbers per input."""
        return self.train_inputs.shape[1]

    @property
    def train_images(self) -> Tensor:
        """A view of the training inputs, (n, channels, height, width)."""
        return self._as_images(self.train_inputs)

    @property
    def test_images(self) -> Tensor:
        """A view of the test inputs, (m, channels, height, width)."""
        return self._as_images(self.test_inputs)

    def _as_images(self, inputs: Tensor) -> Tensor:
        if self.image_shape is None:
            raise ValueError(
                "sapwood.data.Dataset: image_shape must be three sizes for images, "
                f"got None for {self.name}"
            )
        images: Tensor = inputs.unflatten(1, self.image_shape)
        return images


class MissingDataError(FileNotFoundError):
    """A data file that should be there is not; the message names it."""
