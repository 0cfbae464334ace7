"""The full matrix of similarities: normalised rows and the platform's product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _register
from sapwood.ops.similarity import _checks, _gradients, _specs
from sapwood.reference import similarity as reference

_NAME = "similarity_matrix"
_BLOCK = 160  # rows; smaller blocks lose more in small products than the upper half saves


def _normalized(x: Tensor, kind: str) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.flatten(0, -2)
    unit: Tensor = _specs.row_normalize(flat, kind)
    return unit if x.dim() == 2 else unit.view(x.shape)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    """The power of two at the largest entry, so that squared norms stay inside the range."""
    peaks = [t.detach().abs().amax() for t in (x, y) if t.numel()]
    if not peaks:
        return x.new_ones(())
    peak = torch.stack(peaks).amax()
    return torch.where(peak > 0, torch.exp2(torch.floor(torch.log2(peak))), 1.0)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    """-(|x|^2 + |y|^2 - 2 x.y) around the common mean, where the terms are smallest."""
    finite_x, finite_y = reference.finite_rows(x), reference.finite_rows(y)
    x, y = torch.where(finite_x[..., None], x, 0.0), torch.where(finite_y[..., None], y, 0.0)
    scale = _scale(x, y)
    centre = x.detach().mean(-2, keepdim=True) if x.shape[-2] else x.new_zeros(())
    x, y = (x - centre) / scale, (y - centre) / scale
    far = torch.inf
    squares_x = torch.where(finite_x, (x * x).sum(-1), far)
    squares_y = torch.where(finite_y, (y * y).sum(-1), far)
    s = 2 * (x @ y.mT) - (squares_x[..., :, None] + squares_y[..., None, :])
    s = s - torch.relu(s).detach()  # at most 0, with the gradient of the plain formula
    return s * scale * scale


def _native(x: Tensor, y: Tensor | None, kind: str, absolute: bool) -> Tensor:
    if kind == "euclidean":
        s = _euclidean(x, x if y is None else y)
    else:
        if kind == "dot":
            unit = [torch.where(reference.finite_rows(t)[..., None], t, 0.0) for t in _sides(x, y)]
        else:
            unit = [_normalized(t, kind) for t in _sides(x, y)]
        s = _gram(unit[0]) if _may_mirror(*unit) else unit[0] @ unit[-1].mT
    return s.abs() if absolute else s


def _may_mirror(unit: Tensor, *other: Tensor) -> bool:
    """Whether rows meet themselves, in a call that only wants the result."""
    if torch.compiler.is_compiling() or _register.transforms_active():
        return False
    if other or unit.dim() != 2 or unit.device.type != "cpu" or _gradients.wanted(unit):
        return False
    return len(unit) > _BLOCK * torch.get_num_threads()  # else threads would wait for one another


def _gram(unit: Tensor) -> Tensor:  # (N, K) -> (N, N)
    """unit unit^T from the blocks on and above the diagonal; the others are their transposes."""
    n = len(unit)
    s = unit.new_empty(n, n)
    for first in range(0, n, _BLOCK):
        last = min(n, first + _BLOCK)
        torch.mm(unit[first:last], unit[first:].T, out=s[first:last, first:])
        s[last:, first:last] = s[first:last, last:].T
    return s


def _shows_finite_rows(s: Tensor, y: Tensor | None, kind: str) -> bool:
    """Whether the diagonal says it: a row that is not finite has similarity 0 to itself."""
    if torch.compiler.is_compiling() or _register.transforms_active():
        return False
    if y is not None or kind not in reference.UNIT_KINDS or s.dim() != 2 or s.device.type != "cpu":
        return False
    return int(torch.count_nonzero(s.detach().diagonal())) == len(s)


def _sides(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if y is None else (x, y)


def _reference(x: Tensor, y: Tensor | None, kind: str, absolute: bool) -> Tensor:
    return reference.similarity_matrix(x, x if y is None else y, kind, absolute)


_BACKENDS = (
    _backend.native("row_normalize", _native),
    _backend.Backend("reference", lambda *_: None, _reference),
)


def _explain(
    x: Tensor, y: Tensor | None = None, *, kind: str = "cosine", absolute: bool = False, **_: Any
) -> _backend.Explanation:
    return _backend.Explanation(_NAME, _backend.candidates(_BACKENDS, x, y, kind, absolute))


@_backend.explainable(_explain)
def similarity_matrix(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kind: str = "cosine",
    absolute: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """All similarities of the rows of x and y, every pair (i, j) and (j, i) and the diagonal.

    Example::

        s = sapwood.ops.similarity_matrix(torch.randn(300, 64), kind="correlation")  # (300, 300)

    Args:
        x: (*, N, K) floating point.
        y: (*, M, K) of x's dtype; by default x itself.
        kind: "cosine"; "correlation" (rows centred, then cosine); "dot"; or "euclidean", the
            *negative squared* distance, so that larger is nearer for every kind.
        absolute: return magnitudes.
        check_finite: warn about rows that hold NaN or inf (on the CPU).

    Returns:
        (*, N, M), float64 for float64 and else float32. A zero row, a constant row under
        correlation and a row with NaN or inf have similarity 0 to all rows, themselves included; a
        row with NaN or inf has -inf under euclidean.

    Raises:
        ValueError: for shapes that do not match, an unknown kind, correlation of a single column.
        TypeError: for non-tensors and other dtypes.
        RuntimeError: for tensors on different devices.

    References:
        `torch.nn.functional.cosine_similarity`, `torch.corrcoef` and `torch.cdist` are the same
        numbers without the conventions above.
    """
    _checks.rows(_NAME, x, y, kind, matrices=False)
    wide = reference.widened(x)
    wide_y = None if y is None else reference.widened(y)
    chosen = _backend.choose(_NAME, _BACKENDS, wide, wide_y, kind, absolute)
    with _checks.full_precision(x):
        result: Tensor = chosen.run(wide, wide_y, kind, absolute)
    if not _shows_finite_rows(result, y, kind):
        _checks.warn_about_rows(_NAME, kind, check_finite, x, y)
    return result
