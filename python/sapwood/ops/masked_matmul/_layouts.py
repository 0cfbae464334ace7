"""The formats of a packed weight and the tensors each consists of."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("dense", "bitmap", "csr", "sell")
FIELDS = {
    "dense": ("weight",),
    "csr": ("values", "cols", "row_ptr", "row_order"),
    "bitmap": ("values", "words", "row_ptr"),
    "sell": ("values", "index", "window", "slice_ptr"),
}

TRANSPOSED = ("cols_t", "row_ptr_t", "row_order_t", "perm")
SMALL_BATCH = 8  # bitmap and sell are fast up to here

Layout = dict[str, Tensor]


def supported(fmt: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the format has a fast kernel for values of this dtype on this kind of device."""
    return fmt != "sell" or (dtype == torch.float32 and device_type == "cpu")
