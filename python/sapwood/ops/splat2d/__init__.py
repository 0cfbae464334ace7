"""2D Gaussians as images: :func:`splat2d`, its derivatives, and how many pixels it evaluates."""

from sapwood.ops.splat2d._backward import Splat2dGradients, splat2d_backward
from sapwood.ops.splat2d._splat import splat2d, splat2d_pairs
from sapwood.ops.splat2d._validate import DEFAULT_CUTOFF

__all__ = [
    "DEFAULT_CUTOFF",
    "Splat2dGradients",
    "splat2d",
    "splat2d_backward",
    "splat2d_pairs",
]
