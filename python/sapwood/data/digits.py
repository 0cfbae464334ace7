"""Scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, part of its installation."""

from __future__ import annotations

import torch

from sapwood.data.dataset import Dataset


def load_digits(*, test_share: float = 0.2, seed: int = 0) -> Dataset:
    """Reads the digits and splits them, each class in the same proportion.

    Example:
        >>> from sapwood.data import load_digits
        >>> load_digits().test_inputs.shape
        torch.Size([360, 64])

    Args:
        test_share: part of the images held back for testing, in (0, 1).
        seed: of the split; it does not depend on torch's generator.

    Returns:
        Pixels scaled to [0, 1], row-major, and labels 0 to 9.

    Raises:
        ModuleNotFoundError: when scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    pixels, labels = bundled(return_X_y=True)
    split = train_test_split(
        pixels / 16.0, labels, test_size=test_share, random_state=seed, stratify=labels
    )
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in split)
    return Dataset(
        name="digits",
        source="scikit-learn's bundled digits (8 x 8 pixels)",
        train_inputs=x_train.float(),
        train_labels=y_train.long(),
        test_inputs=x_test.float(),
        test_labels=y_test.long(),
        classes=10,
        image_shape=(1, 8, 8),
    )
