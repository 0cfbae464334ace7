"""Reading and writing a part of the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sapwood import _check

__all__ = ["IndexAdd", "InputSelect"]


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


class IndexAdd(_Indexed):
    """Adds a narrow branch to the channels of a stream that it writes.

    Example:
        >>> import torch
        >>> from sapwood.minimize import IndexAdd
        >>> IndexAdd(torch.tensor([2]), dim=1)(torch.zeros(1, 3), torch.ones(1, 1))
        tensor([[0., 0., 1.]])

    Args:
        index: (n,) integer, not negative, the channels that the branch writes; stored as int32.
        dim: the axis of the channels.

    Raises:
        ValueError: if ``index`` is not a vector or has a negative entry.
        TypeError: if ``index`` is not an integer tensor.
    """

    def __init__(self, index: Tensor, dim: int = -1) -> None:
        super().__init__(index, dim)

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        """The stream's shape; ``branch`` has n channels along ``dim``, else the same shape."""
        return stream.index_add(self.dim, self.index, branch)
