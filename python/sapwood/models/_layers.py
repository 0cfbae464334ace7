"""Pieces that several networks share."""

from __future__ import annotations

from torch import Tensor, nn

#: (channels, height, width)
ImageShape = tuple[int, int, int]


class AsImages(nn.Module):
    """Gives inputs the shape of images: (n, features) or (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unflatten(1, self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution without bias: the batch normalisation behind it has one."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def he_init(network: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_in), He et al., arXiv:1502.01852, eq. 10; the rest as is."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def require_image_shape(shape: ImageShape, where: str) -> ImageShape:
    """Checks (channels, height, width).

    Raises:
        ValueError: unless these are three positive integers.
    """
    sizes = tuple(shape)
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"{where}: image_shape must be three positive integers (channels, height, width), "
            f"got {shape!r}"
        )
    return sizes[0], sizes[1], sizes[2]


def require_positive(value: int, name: str, where: str) -> int:
    """Checks a size.

    Raises:
        ValueError: unless it is a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value
