"""VGG networks for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from sapwood.models._layers import (
    AsImages,
    ImageShape,
    conv3x3,
    he_init,
    require_image_shape,
    require_positive,
)

#: Channels of the convolutions between poolings, configurations D and E of the paper.
_D = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
_E = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


def vgg_like(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> nn.Sequential:
    """The "VGG-like" network of the pruning papers: 13 convolutions, 15.0 million parameters.

    Zagoruyko's VGG for CIFAR-10: the convolutions of VGG-16 with batch normalisation, one hidden
    linear layer of 512 with batch normalisation, one linear output. As in SNIP's public code there
    is no dropout. Ours differs in that convolutions have no bias, which batch normalisation would
    cancel: 14 977 728 weights, where SNIP's code counts 14 982 474 with the biases.

    Example:
        >>> import torch
        >>> from sapwood.models import vgg_like
        >>> vgg_like()(torch.zeros(2, 3 * 32 * 32)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Simonyan and Zisserman, arXiv:1409.1556, configuration D; Zagoruyko, 92.45 % on CIFAR-10 in
        Torch, 2015, and its public code; Lee et al., SNIP, arXiv:1810.02340, and its public code.
    """
    shape, classes = _checked(image_shape, classes, "sapwood.models.vgg_like")
    head = [
        nn.Linear(512, 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, classes),
    ]
    return _network(shape, _D, last_pool=nn.AdaptiveMaxPool2d(1), head=head)


def vgg19(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> nn.Sequential:
    """VGG-19 with batch normalisation and a single linear layer: 20.0 million parameters.

    The VGG-19 of GraSP's tables and of much pruning work on CIFAR: the 16 convolutions of the
    paper, without its three wide linear layers. The last feature map is averaged, not maximised.

    Example:
        >>> from sapwood.models import vgg19
        >>> sum(parameter.numel() for parameter in vgg19().parameters())
        20035018

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Simonyan and Zisserman, arXiv:1409.1556, configuration E; the head is that of public code
        for CIFAR, as used by Wang et al., GraSP, arXiv:2002.07376.
    """
    shape, classes = _checked(image_shape, classes, "sapwood.models.vgg19")
    return _network(shape, _E, last_pool=nn.AdaptiveAvgPool2d(1), head=[nn.Linear(512, classes)])


def _checked(image_shape: ImageShape, classes: int, where: str) -> tuple[ImageShape, int]:
    return require_image_shape(image_shape, where), require_positive(classes, "classes", where)


def _network(
    shape: ImageShape,
    groups: Sequence[Sequence[int]],
    last_pool: nn.Module,
    head: Sequence[nn.Module],
) -> nn.Sequential:
    """Convolutions, a pooling behind each group, and a head.

    Poolings round sizes up, as in Zagoruyko's and SNIP's code, so that small images go through.
    """
    features: list[nn.Module] = []
    channels = shape[0]
    for number, group in enumerate(groups):
        for width in group:
            features += [conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        is_last = number == len(groups) - 1
        features.append(last_pool if is_last else nn.MaxPool2d(2, ceil_mode=True))
    network = nn.Sequential(
        OrderedDict(
            images=AsImages(shape),
            features=nn.Sequential(*features),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(*head),
        )
    )
    he_init(network)
    return network
