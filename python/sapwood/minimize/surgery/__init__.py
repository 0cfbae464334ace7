"""Cutting tensors and replacing modules, step by step as a plan says."""

from sapwood.minimize.surgery._attention import guard_fast_paths
from sapwood.minimize.surgery._merge import add_columns
from sapwood.minimize.surgery._operate import operate
from sapwood.minimize.surgery._tensors import refresh

__all__ = ["add_columns", "guard_fast_paths", "operate", "refresh"]
