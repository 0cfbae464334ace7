"""The networks by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from sapwood.models._layers import ImageShape, require_image_shape
from sapwood.models.convnext import convnext_micro
from sapwood.models.perceptron import mlp
from sapwood.models.resnet import resnet18, resnet20
from sapwood.models.small import small_cnn
from sapwood.models.vgg import vgg19, vgg_like
from sapwood.models.vit import vit_micro


def _lenet300(image_shape: ImageShape, classes: int) -> nn.Module:
    return mlp(math.prod(image_shape), classes, (300, 100))


_BUILDERS: dict[str, Callable[[ImageShape, int], nn.Module]] = {
    "lenet300": _lenet300,
    "small_cnn": small_cnn,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "vgg_like": vgg_like,
    "vgg19": vgg19,
    "convnext_micro": convnext_micro,
    "vit_micro": vit_micro,
}

#: What ``build`` knows.
NAMES = tuple(_BUILDERS)


def build(name: str, image_shape: ImageShape, classes: int, seed: int = 0) -> nn.Module:
    """Makes a network for the images of a data set, its weights drawn under a seed.

    Neither the CPU's nor any other device's random state changes. Inputs may be flattened or in
    image shape.

    Example:
        >>> import torch
        >>> from sapwood.models import build
        >>> network = build("small_cnn", (1, 8, 8), classes=10, seed=1)
        >>> network(torch.zeros(2, 64)).shape
        torch.Size([2, 10])

    Args:
        name: ``"lenet300"``, ``"small_cnn"``, ``"resnet20"``, ``"resnet18"``, ``"vgg_like"``,
            ``"vgg19"``, ``"convnext_micro"`` or ``"vit_micro"``.
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.
        seed: of the weights.

    Returns:
        The network, on the CPU, in training mode.

    Raises:
        ValueError: if the name is unknown or a size is not positive.
    """
    where = "sapwood.models.build"
    if name not in _BUILDERS:
        raise ValueError(f"{where}: name must be one of {', '.join(NAMES)}, got {name!r}")
    shape = require_image_shape(image_shape, where)
    # Only the CPU's generator: torch.manual_seed would seed every device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _BUILDERS[name](shape, classes)
