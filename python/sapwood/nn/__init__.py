"""Modules over the ops."""

from sapwood.nn.convert import LayerReport, to_dense, to_sparse
from sapwood.nn.copruned_conv import CoPrunedConv2d, CoPrunedConvLSTMCell
from sapwood.nn.masked_matmul import MaskedConv2d, MaskedLinear, SparseLinear

__all__ = [
    "CoPrunedConv2d",
    "CoPrunedConvLSTMCell",
    "LayerReport",
    "MaskedConv2d",
    "MaskedLinear",
    "SparseLinear",
    "to_dense",
    "to_sparse",
]
