"""One rule per kind of traced operation: what it does to constants and to channels.

A rule receives a :class:`Step`, registers layers and ties between channels with the analysis, and
returns the facts of the result. An operation without a rule keeps all channels of its arguments.
"""

from sapwood.minimize.rules import (
    bounds,
    convolution,
    elementwise,
    leaf,
    linear,
    movement,
    normalization,
    pooling,
)
from sapwood.minimize.rules._registry import RULES, Step, map_facts, opaque, tensors_in
from sapwood.minimize.rules.bounds import bounded

__all__ = [
    "RULES",
    "Step",
    "bounded",
    "bounds",
    "convolution",
    "elementwise",
    "leaf",
    "linear",
    "map_facts",
    "movement",
    "normalization",
    "opaque",
    "pooling",
    "tensors_in",
]
