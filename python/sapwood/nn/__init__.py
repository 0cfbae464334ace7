"""Modules over the ops."""

from sapwood.nn.convert import LayerReport, to_dense, to_sparse
from sapwood.nn.copruned_conv import CoPrunedConv2d, CoPrunedConvLSTMCell
from sapwood.nn.logsemiring import HMM, LogLinear
from sapwood.nn.masked_matmul import MaskedConv2d, MaskedLinear, SparseLinear
from sapwood.nn.splat2d import Splat2d

__all__ = [
    "HMM",
    "CoPrunedConv2d",
    "CoPrunedConvLSTMCell",
    "LayerReport",
    "LogLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "SparseLinear",
    "Splat2d",
    "to_dense",
    "to_sparse",
]
