"""The tasks of the commands that train: their data, their networks and what is usual for both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sapwood import data, models


@dataclass(frozen=True)
class Plan:
    """The networks of a task and what is usual for training them."""

    arch: str
    compared: str  # the network of ``sapwood compare``
    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    every: int  # steps between cuts


PLANS = {
    # the wide network pays when packed, the small one trains many times in a minute
    "digits": Plan("mlp", "lenet300", 15, lr=0.2, weight_decay=1e-3, batch_size=64, every=10),
    "mnist": Plan("lenet300", "lenet300", 8, lr=0.1, weight_decay=1e-4, batch_size=128, every=50),
    "cifar10": Plan(
        "resnet20", "resnet20", 10, lr=0.1, weight_decay=5e-4, batch_size=128, every=50
    ),
}
WIDTHS = {"mlp": (1024, 1024), "lenet300": (300, 100)}
CONVOLUTIONAL = {"smallcnn": "small_cnn", "resnet20": "resnet20"}
#: Networks that cut images into patches; they train with AdamW.
PATCHED = ("convnext_micro", "vit_micro")


def read(task: str, folder: Path | None, limit: int | None = None) -> data.Dataset:
    """The data of a task.

    Args:
        task: a key of ``PLANS``.
        folder: holds the files of those tasks whose data do not come with a package.
        limit: take this many of the training images, the same number of each class.

    Raises:
        MissingDataError: when a file is not there; the message names it.
        ValueError: when a file is damaged, or there are too few images for the limit.
    """
    if limit is not None and limit % 10:
        raise ValueError(f"--limit must be a multiple of the 10 classes, got {limit}")
    per_class = None if limit is None else limit // 10
    if task == "cifar10":
        assert folder is not None
        return data.load_cifar10(folder, per_class=per_class)
    dataset = data.load_digits() if folder is None else data.load_mnist(folder)
    if per_class is None:
        return dataset
    chosen = _first_of_each(dataset.train_labels, dataset.classes, per_class)
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[chosen],
        train_labels=dataset.train_labels[chosen],
    )


def _first_of_each(labels: Tensor, classes: int, count: int) -> Tensor:
    """The places of the first ``count`` rows of each class, in the order of the data."""
    counts = labels.bincount(minlength=classes)
    scarce = int(counts.argmin())
    if counts[scarce] < count:
        raise ValueError(
            f"--limit must be at most {classes * int(counts[scarce])}: there are "
            f"{int(counts[scarce])} training images of class {scarce}"
        )
    places = [(labels == label).nonzero().flatten()[:count] for label in range(classes)]
    return torch.cat(places).sort().values


def fingerprint(dataset: data.Dataset) -> str:
    """Tells data sets apart by their labels, which differ in any other selection or order."""
    labels = torch.cat((dataset.train_labels, dataset.test_labels)).numpy().tobytes()
    shape = f"{tuple(dataset.train_inputs.shape)} {tuple(dataset.test_inputs.shape)}"
    return hashlib.sha256(shape.encode() + labels).hexdigest()[:16]


def network(arch: str, dataset: data.Dataset, seed: int) -> nn.Module:
    """A freshly initialised network for a data set, its weights drawn with ``seed``."""
    if arch in WIDTHS:
        return perceptron(WIDTHS[arch], dataset, seed)
    assert dataset.image_shape is not None
    name = CONVOLUTIONAL.get(arch, arch)
    return models.build(name, dataset.image_shape, dataset.classes, seed)


def perceptron(widths: tuple[int, ...], dataset: data.Dataset, seed: int) -> nn.Module:
    """A perceptron with these hidden layers, its weights drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return models.mlp(dataset.features, dataset.classes, widths)
