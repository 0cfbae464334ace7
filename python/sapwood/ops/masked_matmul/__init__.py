"""Masked and packed linear layers: ``y = act(x (W o M)^T + b)``.

:func:`masked_matmul` while weights and masks change, :func:`pack_sparse` and
:func:`packed_linear` once the mask is fixed.
"""

from sapwood.ops.masked_matmul._layouts import FORMATS
from sapwood.ops.masked_matmul._packed_linear import (
    ACTIVATIONS,
    Decision,
    explain,
    packed_linear,
    sampled_matmul,
)
from sapwood.ops.masked_matmul._packed_weight import PackedWeight, pack_sparse, unpack
from sapwood.ops.masked_matmul._training import masked_matmul

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "Decision",
    "PackedWeight",
    "explain",
    "masked_matmul",
    "pack_sparse",
    "packed_linear",
    "sampled_matmul",
    "unpack",
]
