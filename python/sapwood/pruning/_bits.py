"""Zeroing weights at every step, at the speed of memory.

``masked_fill_`` is an order of magnitude slower on the CPU, and a product with the mask would leave
NaN and -0.0 behind. A bitwise and leaves +0.0 whatever was there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Up to so many elements the bits are as wide as the weights, which takes half the time of bytes
#: that have to be extended; larger tensors would pay for it with as much memory as they have.
FULL_WIDTH = 1 << 18


def keep_bits(mask: Tensor, like: Tensor) -> Tensor:
    """Integers in the memory layout of ``like``: all bits set where the mask is True."""
    width = _INTEGERS[like.element_size()] if like.numel() <= FULL_WIDTH else torch.int8
    return torch.empty_like(like, dtype=width, requires_grad=False).copy_(mask).neg_()


def clear_(tensor: Tensor, bits: Tensor) -> None:
    """Sets the elements without bits to +0.0, in place and outside autograd."""
    if bits.element_size() > tensor.element_size():  # a gradient narrower than its parameter
        bits = bits.to(torch.int8)
    # narrower bits are sign-extended to the width of the elements
    tensor.detach().view(_INTEGERS[tensor.element_size()]).bitwise_and_(bits)
