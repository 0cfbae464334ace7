"""Autocast as torch's own products follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Casts floating arguments as autocast would for F.linear and F.conv2d."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *others)
    )
