"""Reading and writing a part of the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sapwood import _check

__all__ = ["InputSelect", "OutputScatter"]


class _Indexed(nn.Module):
    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        name = type(self).__name__
        _check.tensor(name, "index", index)
        _check.dims(name, "index", index, 1)
        integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
        _check.dtype(name, "index", index, integers)
        if index.numel() and int(index.min()) < 0:
            _check.fail(ValueError, name, "index", "not be negative", int(index.min()))
        self.dim = dim
        # int32 halves the bytes; both kinds of index are accepted by the operations used here.
        self.register_buffer("index", index.detach().to(torch.int32))

    def extra_repr(self) -> str:
        return f"channels={self.index.numel()}, dim={self.dim}"


class InputSelect(_Indexed):
    """Picks the input features that a network still reads, so that its signature stays.

    Example:
        >>> import torch
        >>> from sapwood.minimize import InputSelect
        >>> InputSelect(torch.tensor([0, 2]), dim=-1)(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 3.]])

    Args:
        index: (n,) integer, not negative, the features in the order they are read; stored as int32.
        dim: the axis of the features.

    Raises:
        ValueError: if ``index`` is not a vector or has a negative entry.
        TypeError: if ``index`` is not an integer tensor.
    """

    def __init__(self, index: Tensor, dim: int = -1) -> None:
        super().__init__(index, dim)

    def forward(self, input: Tensor) -> Tensor:
        """The selected features along ``dim``."""
        return input.index_select(self.dim, self.index)


class OutputScatter(_Indexed):
    """Gives the channels of a narrow layer their places among channels that are constants.

    The layer in front computes the channels that depend on its input, and has no bias; the others
    are their bias, or 0. It serves a branch that writes few channels of a wide stream.

    Example:
        >>> import torch
        >>> from sapwood.minimize import OutputScatter
        >>> spread = OutputScatter(torch.tensor([2]), 3, bias=False)
        >>> spread(torch.tensor([[5.0]]))
        tensor([[0., 0., 5.]])

    Args:
        index: (n,) integer, distinct, from 0 to ``width`` - 1, the places of the channels; stored
            as int32.
        width: the number of channels behind.
        dim: the axis of the channels, negative.
        bias: a learnable bias of all channels, 0 at first.
        device: of the bias.
        dtype: of the bias.

    Raises:
        ValueError: if ``index`` is not a vector, has equal entries or one out of range, or if
            ``dim`` is not negative.
        TypeError: if ``index`` is not an integer tensor.
    """

    def __init__(
        self,
        index: Tensor,
        width: int,
        dim: int = -1,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(index, dim)
        if index.numel() and int(index.max()) >= width:
            _check.fail(ValueError, "OutputScatter", "index", f"be below {width}", int(index.max()))
        if len(index.unique()) < len(index):
            _check.fail(ValueError, "OutputScatter", "index", "be distinct", "equal entries")
        if dim >= 0:
            _check.fail(ValueError, "OutputScatter", "dim", "be negative", dim)
        self.width = width
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """n channels along ``dim`` -> ``width`` channels, all other axes the same."""
        shape = list(input.shape)
        shape[self.dim] = self.width
        if self.bias is None:
            base = input.new_zeros(shape)
        else:  # autocast makes the layer's output narrower than the bias
            bias = self.bias.to(input.dtype)
            base = bias.reshape(-1, *[1] * (-1 - self.dim)).expand(shape)
        return base.index_add(self.dim, self.index, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}, bias={self.bias is not None}"
