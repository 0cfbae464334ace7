"""Modules that a minimized network may contain, each exact in its own right."""

from sapwood.minimize.modules.attention import HeadBlock, RaggedAttention
from sapwood.minimize.modules.convolution import AppendOnes, BorderBias2d
from sapwood.minimize.modules.group_normalization import CompensatedGroupNorm
from sapwood.minimize.modules.indexing import InputSelect, OutputScatter
from sapwood.minimize.modules.normalization import CompensatedLayerNorm, CompensatedRMSNorm

__all__ = [
    "AppendOnes",
    "BorderBias2d",
    "CompensatedGroupNorm",
    "CompensatedLayerNorm",
    "CompensatedRMSNorm",
    "HeadBlock",
    "InputSelect",
    "OutputScatter",
    "RaggedAttention",
]
