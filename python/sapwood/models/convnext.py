"""ConvNeXt for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sapwood.models._layers import (
    AsImages,
    ImageShape,
    require_image_shape,
    require_positive,
)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same."""
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm, a perceptron of four times the width, LayerScale, added to x."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.project = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same."""
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.project(self.act(self.expand(self.norm(y))))
        branch: Tensor = self.scale * y
        return x + branch.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt: a patch stem, stages of inverted bottlenecks with LayerNorm, halved in between.

    Example:
        >>> import torch
        >>> from sapwood.models import ConvNeXt
        >>> network = ConvNeXt((1, 8, 8), 10, widths=(8, 16), depths=(1, 1), patch=2)
        >>> network(torch.zeros(2, 64)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs.
        classes: outputs.
        widths: channels of each stage; each stage but the first halves height and width.
        depths: blocks of each stage.
        patch: kernel and stride of the stem.
        scale: what the LayerScale of every block begins with. The paper has 1e-6, for networks of
            18 blocks and more that train for hundreds of epochs; shallow ones learn faster from 1.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Liu et al., A ConvNet for the 2020s, arXiv:2201.03545. Ours: the sizes for small images; no
        stochastic depth.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        classes: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        patch: int = 4,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        where = "sapwood.models.ConvNeXt"
        shape = require_image_shape(image_shape, where)
        require_positive(classes, "classes", where)
        require_positive(patch, "patch", where)
        if len(widths) != len(depths) or not widths:
            raise ValueError(
                f"{where}: widths and depths must have one entry per stage, "
                f"got {len(widths)} and {len(depths)}"
            )
        for size in (*widths, *depths):
            require_positive(size, "every entry of widths and depths", where)
        self.images = AsImages(shape)
        self.stem = nn.Sequential(
            nn.Conv2d(shape[0], widths[0], patch, stride=patch), ChannelNorm(widths[0])
        )
        stages = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers: list[nn.Module] = []
            if stage:
                before = widths[stage - 1]
                layers += [ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2)]
            layers += [ConvNeXtBlock(width, scale) for _ in range(depth)]
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) or (n, channels, height, width) -> (n, classes)."""
        y = self.stages(self.stem(self.images(x)))
        logits: Tensor = self.head(self.norm(y.mean((2, 3))))
        return logits


def convnext_micro(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> ConvNeXt:
    """A ConvNeXt that trains on a CPU: widths 32, 64, 128, 256, depths 1, 1, 2, 1.

    Example:
        >>> import torch
        >>> from sapwood.models import convnext_micro
        >>> convnext_micro()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs, both sizes at least 8. Patches of
            the stem are 4 pixels wide from 32 on, 2 from 16 on, else 1.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Liu et al., arXiv:2201.03545, for the kind of network; the sizes are ours.
    """
    where = "sapwood.models.convnext_micro"
    shape = require_image_shape(image_shape, where)
    smallest = min(shape[1:])
    if smallest < 8:
        raise ValueError(f"{where}: image_shape must be at least 8 x 8, got {shape}")
    patch = 4 if smallest >= 32 else 2 if smallest >= 16 else 1
    return ConvNeXt(shape, classes, widths=(32, 64, 128, 256), depths=(1, 1, 2, 1), patch=patch)
