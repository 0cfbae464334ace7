"""The errors of programs; wrong shapes, values and types are ValueError and TypeError."""

from __future__ import annotations


class TraceError(RuntimeError):
    """A program does what no single trace can hold; the message names the line."""


class UnsupportedMonadError(RuntimeError):
    """A program uses an operation that the chosen monad does not have."""


class TiltError(RuntimeError):
    """Unnormalised masses below a bound value would change the distribution of that value."""
