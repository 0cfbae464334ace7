"""Squeeze-Release: a masked network rewritten exactly into a smaller dense one."""

from sapwood.minimize._cycle import Cycle, SqueezeReleaseResult
from sapwood.minimize.adapters import AttentionCall
from sapwood.minimize.api import analyze, minimize
from sapwood.minimize.errors import MinimizeError
from sapwood.minimize.modules import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    HeadBlock,
    InputSelect,
    OutputScatter,
    RaggedAttention,
)
from sapwood.minimize.plan import ChannelGroup, Plan, Refusal
from sapwood.minimize.release import ReleasedTensor, ReleaseReport, release
from sapwood.minimize.remap import remap_optimizer
from sapwood.minimize.report import MinimizeReport, Moved
from sapwood.minimize.squeeze_release import SqueezeRelease
from sapwood.minimize.storage import load, save

__all__ = [
    "AppendOnes",
    "AttentionCall",
    "BorderBias2d",
    "ChannelGroup",
    "CompensatedGroupNorm",
    "CompensatedLayerNorm",
    "CompensatedRMSNorm",
    "Cycle",
    "HeadBlock",
    "InputSelect",
    "MinimizeError",
    "MinimizeReport",
    "Moved",
    "OutputScatter",
    "Plan",
    "RaggedAttention",
    "Refusal",
    "ReleaseReport",
    "ReleasedTensor",
    "SqueezeRelease",
    "SqueezeReleaseResult",
    "analyze",
    "load",
    "minimize",
    "release",
    "remap_optimizer",
    "save",
]
