"""Similarities of rows: the matrix, and what can be had without it.

:func:`similarity_matrix` where N x M fits; :func:`similarity_pairs`, :func:`similarity_topk` and
:func:`similarity_clusters` where it does not; :func:`linear_cka` compares two representations.
"""

from sapwood.ops.similarity._cka import CKAAccumulator, kernel_cka, linear_cka
from sapwood.ops.similarity._matrix import similarity_matrix
from sapwood.ops.similarity._selection import (
    Pairs,
    similarity_clusters,
    similarity_pairs,
    similarity_topk,
)

__all__ = [
    "CKAAccumulator",
    "Pairs",
    "kernel_cka",
    "linear_cka",
    "similarity_clusters",
    "similarity_matrix",
    "similarity_pairs",
    "similarity_topk",
]
