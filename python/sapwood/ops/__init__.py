"""The kernels as torch ops. Importing this module loads the compiled library."""

from sapwood.ops._dispatch import DispatchTable, calibrate
from sapwood.ops.masked_matmul import (
    Decision,
    PackedWeight,
    explain,
    masked_matmul,
    pack_sparse,
    packed_linear,
    sampled_matmul,
    unpack,
)

__all__ = [
    "Decision",
    "DispatchTable",
    "PackedWeight",
    "calibrate",
    "explain",
    "masked_matmul",
    "pack_sparse",
    "packed_linear",
    "sampled_matmul",
    "unpack",
]
