"""Selected similarities without the N x M matrix: pairs above a threshold, the k best, clusters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.similarity import _checks, _gradients, _specs, _triton
from sapwood.reference import similarity as reference

_ON_OVERFLOW = ("warn", "raise")


def _backends(op: str) -> tuple[_backend.Backend, ...]:
    return (
        _backend.native(op, getattr(_specs, op)),
        _triton.backend(op),
        _backend.Backend("reference", lambda *_: None, getattr(reference, op)),
    )


_PAIRS = _backends("similarity_pairs")
_TOPK = _backends("similarity_topk")
_CLUSTERS = _backends("similarity_clusters")


def _detached(y: Tensor | None) -> Tensor | None:
    return None if y is None else y.detach()


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows with their similarity, sorted by row, then by column; unpacks into three.

    Example::

        row, col, value = sapwood.ops.similarity_pairs(torch.randn(100, 8), threshold=0.9)
    """

    row: Tensor  # (E,) int64
    col: Tensor  # (E,) int64
    value: Tensor  # (E,)
    shape: tuple[int, int]  # of the matrix they are entries of
    _truncated: Tensor  # () bool

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.row, self.col, self.value))

    def __len__(self) -> int:
        return len(self.row)

    @property
    def truncated(self) -> bool:
        """Whether ``max_pairs`` left pairs out."""
        return bool(self._truncated)

    def to_csr(self) -> Tensor:
        """The pairs as a sparse CSR matrix (N, M); of one input only the upper triangle is set."""
        starts = torch.zeros(self.shape[0] + 1, dtype=torch.int64, device=self.row.device)
        starts[1:] = torch.bincount(self.row, minlength=self.shape[0]).cumsum(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(starts, self.col, self.value, self.shape)


def _explain_pairs(
    x: Tensor, y: Tensor | None = None, *, threshold: float, kind: str = "cosine", **_: Any
) -> _backend.Explanation:
    lines = _backend.candidates(_PAIRS, x, y, threshold, kind)
    return _backend.Explanation("similarity_pairs", lines)


@_backend.explainable(_explain_pairs)
def similarity_pairs(
    x: Tensor,
    y: Tensor | None = None,
    *,
    threshold: float,
    kind: str = "cosine",
    absolute: bool = False,
    include_self: bool = False,
    max_pairs: int | None = None,
    on_overflow: str = "warn",
    recheck: bool = True,
    precision: str = "fp32",
    check_finite: bool = True,
) -> Pairs:
    """Pairs of rows whose similarity reaches a threshold; within x each pair once, with row < col.

    Example::

        pairs = sapwood.ops.similarity_pairs(torch.randn(1000, 64), threshold=0.5)
        print(len(pairs), pairs.value.max())

    The N x M matrix never exists: memory is that of the inputs and of the pairs found.

    Args:
        x: (N, K) floating point.
        y: (M, K) of x's dtype; by default x itself, and then (i, j) with i < j only.
        threshold: a pair is reported if and only if its similarity is at least this; for euclidean
            it is compared with the negative squared distance.
        kind: "cosine", "correlation", "dot" or "euclidean", see :func:`similarity_matrix`.
        absolute: compare magnitudes; the values keep their sign.
        include_self: without y, report (i, i) too.
        max_pairs: keep at most so many, the first ones by row and column.
        on_overflow: "warn" or "raise" when max_pairs left something out.
        recheck: decide in float64 where the product is too close to the threshold to tell, so that
            the pairs are those of float64 arithmetic. False trusts the product.
        precision: "fp32", or "bf16" to let products be taken in bfloat16: done for float32 and half
            precision on CPUs with AVX512-BF16 and by Triton, and not for euclidean. They only
            propose; what counts is decided in float64, so the results are the same. Needs recheck.
        check_finite: warn about rows that hold NaN or inf (on the CPU).

    Returns:
        ``Pairs``: ``row``, ``col`` (E,) int64 and ``value`` (E,), float32 unless x is float64;
        ``truncated``; ``to_csr()``. Values are differentiable with respect to x and y.

    Raises:
        ValueError: for shapes that do not match, unknown names, a threshold that is NaN.
        TypeError: for non-tensors and other dtypes.
        RuntimeError: for tensors on different devices, and for more than max_pairs if that raises.

    References:
        The full-matrix way is ``(similarity_matrix(x) >= threshold).triu(1).nonzero()``.
    """
    op = "similarity_pairs"
    _checks.rows(op, x, y, kind)
    limit = _checks.threshold(op, threshold)
    _check.one_of(op, "on_overflow", on_overflow, _ON_OVERFLOW)
    if max_pairs is not None and max_pairs < 0:
        _check.fail(ValueError, op, "max_pairs", "be at least 0", max_pairs)
    _checks.precision(op, precision, recheck)
    _checks.warn_about_rows(op, kind, check_finite, x, y)
    chosen = _backend.choose(op, _PAIRS, x, y, limit, kind)
    most = -1 if max_pairs is None else max_pairs
    row, col, value, truncated = chosen.run(
        x.detach(), _detached(y), limit, kind, absolute, include_self, most, recheck, precision
    )
    if _gradients.wanted(x, y):
        value = _gradients.attach(value, x, y, row, col, kind)
    pairs = Pairs(row, col, value, (len(x), len(x if y is None else y)), truncated)
    if max_pairs is not None and not torch.compiler.is_compiling() and pairs.truncated:
        _report_overflow(pairs, max_pairs, on_overflow, y is None, include_self)
    return pairs


def _report_overflow(
    pairs: Pairs, max_pairs: int, on_overflow: str, self_: bool, include_self: bool
) -> None:
    message = f"sapwood.similarity_pairs: more than max_pairs={max_pairs} pairs reach the threshold"
    if len(pairs):
        about = float(f"{_extrapolated(pairs, self_, include_self):.2g}")
        row = int(pairs.row[-1])
        message += f", about {about:,.0f} judged by those up to row {row}, which are kept"
    if on_overflow == "raise":
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _extrapolated(pairs: Pairs, self_: bool, include_self: bool) -> float:
    """How many pairs there are in all, if the rest holds as many as the places up to the last."""
    (n, m), row, col = pairs.shape, int(pairs.row[-1]), int(pairs.col[-1])
    if not self_:
        return len(pairs) * n * m / (row * m + col + 1)
    diagonal = int(include_self)  # row i has n - 1 - i places beside it
    seen = row * (2 * n - 1 - row) // 2 + row * diagonal + col - row + diagonal
    return len(pairs) * (n * (n - 1) // 2 + n * diagonal) / seen


def _explain_topk(
    x: Tensor, k: int, y: Tensor | None = None, *, kind: str = "cosine", **_: Any
) -> _backend.Explanation:
    return _backend.Explanation("similarity_topk", _backend.candidates(_TOPK, x, y, k, kind))


@_backend.explainable(_explain_topk)
def similarity_topk(
    x: Tensor,
    k: int,
    y: Tensor | None = None,
    *,
    kind: str = "cosine",
    absolute: bool = False,
    include_self: bool = False,
    recheck: bool = True,
    precision: str = "fp32",
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of y for every row of x; within x a row is not its own neighbour.

    Example::

        values, indices = sapwood.ops.similarity_topk(torch.randn(1000, 64), 10)  # (1000, 10) each

    Args:
        x: (N, K) floating point.
        k: how many, at least 1; may exceed the number of candidates.
        y: (M, K) of x's dtype; by default x itself.
        kind: "cosine", "correlation", "dot" or "euclidean", see :func:`similarity_matrix`.
        absolute: rank by magnitude; the values keep their sign.
        include_self: without y, a row may be its own neighbour.
        recheck: rank in float64 what the product cannot tell apart, so that the result is that of
            float64 arithmetic. False trusts the product.
        precision: "fp32", or "bf16" to let products be taken in bfloat16: done for float32 and half
            precision on CPUs with AVX512-BF16 and by Triton, and not for euclidean. They only
            propose; what counts is decided in float64, so the results are the same. Needs recheck.
        check_finite: warn about rows that hold NaN or inf (on the CPU).

    Returns:
        Similarities (N, k), float32 unless x is float64, and indices (N, k) int64; best first, ties
        by smaller index, then -inf and -1 where there are fewer than k candidates. Similarities are
        differentiable with respect to x and y.

    Raises:
        ValueError: for shapes that do not match, an unknown kind, k below 1.
        TypeError: for non-tensors and other dtypes.
        RuntimeError: for tensors on different devices.

    References:
        The full-matrix way is ``similarity_matrix(x, y).topk(k)``.
    """
    op = "similarity_topk"
    _checks.rows(op, x, y, kind)
    if k < 1:
        _check.fail(ValueError, op, "k", "be at least 1", k)
    _checks.precision(op, precision, recheck)
    _checks.warn_about_rows(op, kind, check_finite, x, y)
    chosen = _backend.choose(op, _TOPK, x, y, k, kind)
    values, indices = chosen.run(
        x.detach(), _detached(y), k, kind, absolute, include_self, recheck, precision
    )
    if _gradients.wanted(x, y):
        row = torch.arange(len(x), device=x.device).repeat_interleave(k)
        flat = _gradients.attach(values.flatten(), x, y, row, indices.flatten(), kind)
        values = flat.view_as(values)
    return values, indices


def _explain_clusters(
    x: Tensor, *, threshold: float, kind: str = "cosine", **_: Any
) -> _backend.Explanation:
    lines = _backend.candidates(_CLUSTERS, x, threshold, kind)
    return _backend.Explanation("similarity_clusters", lines)


@_backend.explainable(_explain_clusters)
def similarity_clusters(
    x: Tensor,
    *,
    threshold: float,
    kind: str = "cosine",
    absolute: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Connected components of the pairs that reach a threshold, without storing the pairs.

    Example::

        labels = sapwood.ops.similarity_clusters(torch.randn(1000, 64), threshold=0.5)  # (1000,)

    Args:
        x: (N, K) floating point.
        threshold: rows are linked if their similarity is at least this.
        kind: "cosine", "correlation", "dot" or "euclidean", see :func:`similarity_matrix`.
        absolute: compare magnitudes.
        check_finite: warn about rows that hold NaN or inf (on the CPU).

    Returns:
        labels (N,) int64, numbered from 0 by first appearance. Memory is proportional to x.

    Raises:
        ValueError: for shapes that do not match, an unknown kind, a threshold that is NaN.
        TypeError: for non-tensors and other dtypes.

    References:
        The full-matrix way is ``scipy.sparse.csgraph.connected_components`` of the pairs.
    """
    op = "similarity_clusters"
    _checks.rows(op, x, None, kind)
    limit = _checks.threshold(op, threshold)
    _checks.warn_about_rows(op, kind, check_finite, x)
    chosen = _backend.choose(op, _CLUSTERS, x, limit, kind)
    labels: Tensor = chosen.run(x.detach(), limit, kind, absolute)
    return labels
