"""Argument checks, all worded ``sapwood.<op>: <argument> must <expectation>, got <actual>``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

_check_values = False


@contextmanager
def check_values(enabled: bool = True) -> Iterator[None]:
    """Turns on checks that read tensor contents; they synchronise and are meant for debugging.

    Example::

        with sapwood.check_values():
            sapwood.ops.packed_linear(x, packed)  # raises when x holds inf or NaN
    """
    global _check_values
    before, _check_values = _check_values, enabled
    try:
        yield
    finally:
        _check_values = before


def values_are_checked() -> bool:
    return _check_values


def fail(
    kind: type[Exception], op: str, argument: str, expectation: str, actual: object
) -> NoReturn:
    raise kind(f"sapwood.{op}: {argument} must {expectation}, got {actual}")


def tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "be a tensor", type(value).__name__)


def floating(op: str, argument: str, value: Tensor) -> None:
    if not value.is_floating_point():
        fail(TypeError, op, argument, "be floating point", value.dtype)


def dtype(op: str, argument: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        fail(TypeError, op, argument, f"be {names}", value.dtype)


def same_dtype(op: str, argument: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.dtype != reference.dtype:
        fail(TypeError, op, argument, f"have {other}'s dtype {reference.dtype}", value.dtype)


def dims(op: str, argument: str, value: Tensor, count: int) -> None:
    if value.dim() != count:
        fail(ValueError, op, argument, f"have {count} dimensions", f"shape {tuple(value.shape)}")


def shape(
    op: str, argument: str, value: Tensor, expected: tuple[int, ...], owner: str = ""
) -> None:
    if value.shape != expected:
        whose = f"{owner}'s shape" if owner else "shape"
        fail(ValueError, op, argument, f"have {whose} {tuple(expected)}", tuple(value.shape))


def last_dim(op: str, argument: str, value: Tensor, size: int, owner: str) -> None:
    if value.dim() == 0 or value.shape[-1] != size:
        fail(
            ValueError,
            op,
            argument,
            f"have a last dimension of {size} ({owner})",
            f"shape {tuple(value.shape)}",
        )


def one_of(op: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        fail(ValueError, op, argument, f"be one of {', '.join(allowed)}", repr(value))


def same_device(op: str, **tensors: Tensor | None) -> None:
    present = [(name, value.device) for name, value in tensors.items() if value is not None]
    first, device = present[0]
    for name, other in present[1:]:
        if other != device:
            raise RuntimeError(f"sapwood.{op}: {first} is on {device} but {name} is on {other}")
