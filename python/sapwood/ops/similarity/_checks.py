"""What all ops of the family check, and the warning about rows that are not finite."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sapwood import _check, _register
from sapwood.reference.similarity import KINDS, finite_rows

PRECISIONS = ("fp32", "bf16")


def rows(op: str, x: Tensor, y: Tensor | None, kind: str, *, matrices: bool = True) -> None:
    """Checks x (N, K) and y (M, K), or both with leading dimensions."""
    _check.tensor(op, "x", x)
    _check.floating(op, "x", x)
    _check.one_of(op, "kind", kind, KINDS)
    if matrices:
        _check.dims(op, "x", x, 2)
    elif x.dim() < 2:
        _check.fail(ValueError, op, "x", "have at least 2 dimensions", f"shape {tuple(x.shape)}")
    if y is not None:
        _check.tensor(op, "y", y)
        _check.same_dtype(op, "y", y, "x", x)
        if matrices:
            _check.dims(op, "y", y, 2)
        elif y.dim() < 2:
            _check.fail(
                ValueError, op, "y", "have at least 2 dimensions", f"shape {tuple(y.shape)}"
            )
        _check.last_dim(op, "y", y, x.shape[-1], "x's columns")
        _check.same_device(op, x=x, y=y)
    if kind == "correlation" and x.shape[-1] < 2:
        _check.fail(ValueError, op, "x", "have at least 2 columns for correlation", x.shape[-1])


def threshold(op: str, value: float) -> float:
    """The threshold as a float that compares."""
    number = float(value)
    if math.isnan(number):
        _check.fail(ValueError, op, "threshold", "be a number", number)
    return number


def precision(op: str, value: str, recheck: bool) -> None:
    """Products in bfloat16 may propose, but not decide."""
    _check.one_of(op, "precision", value, PRECISIONS)
    if value != "fp32" and not recheck:
        _check.fail(ValueError, op, "precision", "be fp32 without recheck", repr(value))


def warn_about_rows(op: str, kind: str, check_finite: bool, *tensors: Tensor | None) -> None:
    """One warning per call on how many rows hold NaN or inf; on the CPU, where looking is free."""
    if not check_finite or torch.compiler.is_compiling() or _register.transforms_active():
        return
    count = 0
    for t in tensors:
        if t is None or t.device.type != "cpu" or not _suspicious(t.detach()):
            continue
        count += int((~finite_rows(t.detach())).sum())
    if count:
        meaning = "-inf" if kind == "euclidean" else "0"
        warnings.warn(
            f"sapwood.{op}: {count} rows hold NaN or inf; "
            f"their similarity to all rows is {meaning}",
            RuntimeWarning,
            stacklevel=3,
        )


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Products inside are taken in the inputs' precision, under autocast too."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _suspicious(t: Tensor) -> bool:
    """False only if all entries are finite: a single pass, where isfinite takes three."""
    return not math.isfinite(float(t.sum()))
