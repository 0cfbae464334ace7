"""Squeeze-Release: a masked network rewritten exactly into a smaller dense one."""

from sapwood.minimize.modules import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    HeadBlock,
    IndexAdd,
    InputSelect,
    RaggedAttention,
)

__all__ = [
    "AppendOnes",
    "BorderBias2d",
    "CompensatedGroupNorm",
    "CompensatedLayerNorm",
    "CompensatedRMSNorm",
    "HeadBlock",
    "IndexAdd",
    "InputSelect",
    "RaggedAttention",
]
