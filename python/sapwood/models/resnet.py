"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.models._layers import (
    AsImages,
    ImageShape,
    conv3x3,
    he_init,
    require_image_shape,
    require_positive,
)

#: (channels in, channels out, stride) -> the path around a block whose sizes change
Shortcut = Callable[[int, int, int], nn.Module]


class PaddedIdentity(nn.Module):
    """Option A of He et al.: every stride-th pixel, new channels zero, no parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.new_channels = channels_out - channels_in
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Option B of He et al.: a 1 x 1 convolution and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a path around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, around: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else around(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A 3 x 3 stem, stages of basic blocks, global average pooling, one linear layer.

    Example:
        >>> import torch
        >>> from sapwood.models import ResNet
        >>> network = ResNet((1, 8, 8), 10, widths=(4, 8), depths=(1, 1), option="A")
        >>> network(torch.zeros(2, 64)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.
        widths: channels of each stage, not falling; each stage but the first halves height and
            width.
        depths: blocks of each stage.
        option: the shortcuts where sizes change: ``"A"`` pads with zeros, ``"B"`` projects.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        classes: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        option: str,
    ) -> None:
        super().__init__()
        where = "sapwood.models.ResNet"
        shape = require_image_shape(image_shape, where)
        require_positive(classes, "classes", where)
        if len(widths) != len(depths) or not widths:
            raise ValueError(
                f"{where}: widths and depths must have one entry per stage, "
                f"got {len(widths)} and {len(depths)}"
            )
        for size in (*widths, *depths):
            require_positive(size, "every entry of widths and depths", where)
        if list(widths) != sorted(widths):
            raise ValueError(f"{where}: widths must not fall from stage to stage, got {widths}")
        if option not in ("A", "B"):
            raise ValueError(f"{where}: option must be 'A' or 'B', got {option!r}")
        around: Shortcut = PaddedIdentity if option == "A" else projection
        self.images = AsImages(shape)
        self.conv1 = conv3x3(shape[0], widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width, stride, around))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) or (n, channels, height, width) -> (n, classes)."""
        y = F.relu(self.bn1(self.conv1(self.images(x))))
        y = self.stages(y)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        logits: Tensor = self.linear(y)
        return logits


def resnet20(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> ResNet:
    """ResNet-20 for CIFAR-10: 16, 32 and 64 channels, three blocks each, 0.27 million parameters.

    The shortcuts are option A, as in the paper: they have no parameters.

    Example:
        >>> import torch
        >>> from sapwood.models import resnet20
        >>> network = resnet20()
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in network.parameters())
        269722

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        He et al., arXiv:1512.03385, section 4.2 and table 6.
    """
    return ResNet(image_shape, classes, widths=(16, 32, 64), depths=(3, 3, 3), option="A")


def resnet18(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> ResNet:
    """ResNet-18 with a stem for small images: 11.17 million parameters.

    The network of He et al. for ImageNet with the customary change for CIFAR: the first
    convolution is 3 x 3 with stride 1 instead of 7 x 7 with stride 2, without pooling behind it.
    The shortcuts are option B.

    Example:
        >>> from sapwood.models import resnet18
        >>> sum(parameter.numel() for parameter in resnet18().parameters())
        11173962

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        He et al., arXiv:1512.03385, table 1; the stem is that of public CIFAR code.
    """
    widths = (64, 128, 256, 512)
    return ResNet(image_shape, classes, widths=widths, depths=(2, 2, 2, 2), option="B")
