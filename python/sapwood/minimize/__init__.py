"""Squeeze-Release: a masked network rewritten exactly into a smaller dense one."""

from sapwood.minimize._cycle import Cycle, SqueezeReleaseResult
from sapwood.minimize.api import analyze, minimize
from sapwood.minimize.errors import MinimizeError
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
from sapwood.minimize.plan import ChannelGroup, Plan, Refusal
from sapwood.minimize.release import ReleasedTensor, ReleaseReport, release
from sapwood.minimize.report import MinimizeReport, Moved
from sapwood.minimize.squeeze_release import SqueezeRelease

__all__ = [
    "AppendOnes",
    "BorderBias2d",
    "ChannelGroup",
    "CompensatedGroupNorm",
    "CompensatedLayerNorm",
    "CompensatedRMSNorm",
    "Cycle",
    "HeadBlock",
    "IndexAdd",
    "InputSelect",
    "MinimizeError",
    "MinimizeReport",
    "Moved",
    "Plan",
    "RaggedAttention",
    "Refusal",
    "ReleaseReport",
    "ReleasedTensor",
    "SqueezeRelease",
    "SqueezeReleaseResult",
    "analyze",
    "minimize",
    "release",
]
