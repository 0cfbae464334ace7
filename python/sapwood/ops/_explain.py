"""Asks any op of the package which kernel a call would run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sapwood.ops.copruned_conv
import sapwood.ops.logsemiring
import sapwood.ops.masked_matmul
import sapwood.ops.similarity  # noqa: F401  each registers how to explain its ops
from sapwood import _backend, _check


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> _backend.Explanation:
    """Says which kernel a call would run and why the others cannot or do not.

    Example::

        print(sapwood.explain(sapwood.ops.masked_matmul, x, weight, mask))

    Args:
        op: a public op, or its name.
        *args: what you would call it with.
        **kwargs: likewise.

    Returns:
        An ``Explanation``; ``print`` it, or read its ``chosen`` and ``candidates``.

    Raises:
        ValueError: for a function that is not an op of sapwood.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    _check.one_of("explain", "op", name, sorted(_backend.explainers))
    return _backend.explainers[name](*args, **kwargs)
