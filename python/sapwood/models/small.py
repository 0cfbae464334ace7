"""A small convolutional network."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sapwood.models._layers import (
    AsImages,
    ImageShape,
    conv3x3,
    he_init,
    require_image_shape,
    require_positive,
)

_WIDTHS = (16, 32, 64)


def small_cnn(image_shape: ImageShape, classes: int) -> nn.Sequential:
    """Three 3 x 3 convolutions with batch normalisation, for digits, MNIST and CIFAR in seconds.

    16, 32 and 64 channels, the last two halving height and width; then global average pooling and
    one linear layer. It follows no paper.

    Example:
        >>> import torch
        >>> from sapwood.models import small_cnn
        >>> small_cnn((1, 8, 8), 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.
    """
    where = "sapwood.models.small_cnn"
    shape = require_image_shape(image_shape, where)
    require_positive(classes, "classes", where)
    layers: OrderedDict[str, nn.Module] = OrderedDict(images=AsImages(shape))
    channels = shape[0]
    for number, width in enumerate(_WIDTHS, 1):
        layers[f"conv{number}"] = conv3x3(channels, width, stride=1 if number == 1 else 2)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels, classes)
    network = nn.Sequential(layers)
    he_init(network)
    return network
