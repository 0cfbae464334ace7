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
from sapwood.ops.similarity import (
    CKAAccumulator,
    Pairs,
    kernel_cka,
    linear_cka,
    similarity_clusters,
    similarity_matrix,
    similarity_pairs,
    similarity_topk,
)

__all__ = [
    "CKAAccumulator",
    "Decision",
    "DispatchTable",
    "PackedWeight",
    "Pairs",
    "calibrate",
    "explain",
    "kernel_cka",
    "linear_cka",
    "masked_matmul",
    "pack_sparse",
    "packed_linear",
    "sampled_matmul",
    "similarity_clusters",
    "similarity_matrix",
    "similarity_pairs",
    "similarity_topk",
    "unpack",
]
