"""Cutting tensors and replacing modules, step by step as a plan says."""

from sapwood.minimize.surgery._operate import operate

__all__ = ["operate"]
