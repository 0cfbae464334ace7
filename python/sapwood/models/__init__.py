"""The networks that the tables of the field are about, freshly initialised and in plain torch.

- ``mlp``: perceptrons; LeNet-300-100 is ``mlp(784, 10, (300, 100))``.
- ``small_cnn``: three convolutions, for tests and first experiments.
- ``resnet20``, ``resnet18``: residual networks for small images.
- ``vgg_like``, ``vgg19``: VGG networks for small images.
- ``convnext_micro``, ``vit_micro``: networks with LayerNorm and attention, small enough for a CPU.
- ``build`` makes any of them by name for the image shape of a data set, under a seed.

All convolutional networks take images of any size, in image shape or flattened, so that the inputs
of a ``sapwood.data.Dataset`` fit as they are. Parameter counts are those of the published networks;
each docstring says where a network differs from its source.
"""

from __future__ import annotations

from sapwood.models.convnext import ConvNeXt, convnext_micro
from sapwood.models.perceptron import mlp
from sapwood.models.registry import NAMES, build
from sapwood.models.resnet import ResNet, resnet18, resnet20
from sapwood.models.small import small_cnn
from sapwood.models.vgg import vgg19, vgg_like
from sapwood.models.vit import ViT, vit_micro

__all__ = [
    "NAMES",
    "ConvNeXt",
    "ResNet",
    "ViT",
    "build",
    "convnext_micro",
    "mlp",
    "resnet18",
    "resnet20",
    "small_cnn",
    "vgg19",
    "vgg_like",
    "vit_micro",
]
