"""The error that minimization raises when a rewrite is not what it claims to be."""

from __future__ import annotations

__all__ = ["MinimizeError"]


class MinimizeError(RuntimeError):
    """A network could not be traced, or its minimized form did not compute the same function."""
