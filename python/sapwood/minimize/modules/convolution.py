"""What constants leave behind when they are removed in front of a zero-padded convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood import _check

__all__ = ["AppendOnes", "BorderBias2d"]


class BorderBias2d(nn.Conv2d):
    """A zero-padded convolution whose bias depends on how much of the kernel lies in the image.

    An input channel that holds the constant c adds ``c W_k`` for every tap k that falls into the
    image, and nothing for taps in the padding. The sum over removed channels is kept per tap; the
    map for an image size is their convolution with ones. It is exact for every size, stride and
    dilation, and is computed once per size.

    Example:
        >>> import torch
        >>> from sapwood.minimize import BorderBias2d
        >>> conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        >>> x = torch.randn(1, 2, 5, 5)
        >>> x[:, 1] = 3.0                                  # the second channel is a constant
        >>> narrow = torch.nn.Conv2d(1, 4, 3, padding=1)
        >>> narrow.weight.data, narrow.bias.data = conv.weight.data[:, :1], conv.bias.data
        >>> small = BorderBias2d.from_conv(narrow, 3.0 * conv.weight.data[:, 1])
        >>> torch.allclose(small(x[:, :1]), conv(x), atol=1e-6)
        True

    Args:
        *args: as ``nn.Conv2d``.
        **kwargs: as ``nn.Conv2d``; ``padding_mode`` is ``"zeros"``, since with any other a constant
            folds into the ordinary bias.

    The buffer ``taps`` ((out_channels, kernel height, kernel width)) starts at 0.

    Raises:
        ValueError: if ``padding_mode`` is not ``"zeros"``.
    """

    taps: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check.one_of("BorderBias2d", "padding_mode", self.padding_mode, ("zeros",))
        shape = (self.out_channels, *self.kernel_size)
        like = self.weight
        self.register_buffer("taps", torch.zeros(shape, device=like.device, dtype=like.dtype))
        self._map: tuple[tuple[Any, ...], Tensor] | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, taps: Tensor) -> BorderBias2d:
        """Shares weight and bias of ``conv``.

        Args:
            conv: the convolution over the kept channels; where it has taps itself they are added.
            taps: (out_channels, kernel height, kernel width), the sum of ``c_r W_irk`` over the
                removed input channels r.

        Returns:
            The convolution with both, in the mode of ``conv``.

        Raises:
            ValueError: if the shape of ``taps`` is not that of the kernel.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        expected = (conv.out_channels, *conv.kernel_size)
        _check.shape("BorderBias2d.from_conv", "taps", taps, expected)
        layer.weight, layer.bias = conv.weight, conv.bias
        earlier = conv.taps.double() if isinstance(conv, BorderBias2d) else 0.0
        layer.taps = (taps.detach().double() + earlier).to(conv.weight)
        return layer.train(conv.training)

    def border_map(self, height: int, width: int) -> Tensor:
        """(1, out_channels, output height, output width): what is added for this image size."""
        ones = self.taps.new_ones(1, 1, height, width)
        taps = self.taps[:, None]
        border: Tensor = F.conv2d(ones, taps, None, self.stride, self.padding, self.dilation)
        return border

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, H, W) or (in_channels, H, W), as ``nn.Conv2d``."""
        border = self._cached(input.shape[-2], input.shape[-1])
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        # Autocast returns a narrower dtype, which the map follows.
        return y + (border if input.dim() == 4 else border[0]).to(y.dtype)

    def _cached(self, height: int, width: int) -> Tensor:
        if torch.compiler.is_compiling():
            return self.border_map(height, width)
        taps = self.taps
        key = (height, width, taps._version, taps.data_ptr(), taps.dtype, taps.device)
        if self._map is None or self._map[0] != key:
            with torch.no_grad():
                self._map = key, self.border_map(height, width)
        return self._map[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a copy makes its own

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, border_values={self.taps.numel()}"


class AppendOnes(nn.Module):
    """Appends a channel of ones, the export-friendly way to carry constants through zero padding.

    In front of a convolution whose last input channel has the weight ``sum_r c_r W_irk`` it does
    what :class:`BorderBias2d` does, with standard operations only.

    Example:
        >>> import torch
        >>> from sapwood.minimize import AppendOnes
        >>> AppendOnes()(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 4, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """(batch, C, ...) -> (batch, C + 1, ...)."""
        return torch.cat((input, torch.ones_like(input[:, :1])), 1)
