"""Similarities of rows in plain torch, by way of the full matrix::

    s_ij = x_i . y_j                       dot
    s_ij = x_i . y_j / (|x_i| |y_j|)       cosine; correlation centres each row first
    s_ij = -|x_i - y_j|^2                  euclidean: larger is nearer

A row without direction (zero, constant under correlation, not finite) has similarity 0 to all rows,
under euclidean a row that is not finite has -inf. Functions named as an op of ``csrc/schema.cpp``
have its signature. Half precision is widened to float32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("cosine", "correlation", "dot", "euclidean")
UNIT_KINDS = ("cosine", "correlation")


def widened(x: Tensor) -> Tensor:
    """The type that results have: float32 for half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def finite_rows(x: Tensor) -> Tensor:  # (..., N) bool
    return torch.isfinite(x).all(-1)


def row_normalize(x: Tensor, kind: str) -> Tensor:  # (..., N, K) -> (..., N, K)
    """Rows of norm 1; scaled by their largest entry first, so that no square leaves the range."""
    if x.shape[-1] == 0:
        return x.clone()
    wide = widened(x)
    varies = (wide != wide[..., :1]).any(-1) if kind == "correlation" else (wide != 0).any(-1)
    keep = (finite_rows(x) & varies)[..., None]
    rows = torch.where(keep, wide, 0.0)
    rows = rows / torch.where(keep, rows.abs().amax(-1, keepdim=True), 1.0).detach()
    if kind == "correlation":
        rows = rows - rows.mean(-1, keepdim=True)
    squares = (rows * rows).sum(-1, keepdim=True)
    return (rows / torch.where(keep, squares, 1.0).sqrt()).to(x.dtype)


def similarity_matrix(x: Tensor, y: Tensor, kind: str, absolute: bool) -> Tensor:  # (N, M)
    x, y = widened(x), widened(y)
    if kind == "euclidean":
        near = (finite_rows(x)[..., :, None] & finite_rows(y)[..., None, :])[..., None]
        difference = torch.where(near, x[..., :, None, :] - y[..., None, :, :], 0.0)
        s = -(difference * difference).sum(-1)
        s = torch.where(near[..., 0], s, -torch.inf)
    else:
        if kind == "dot":
            x, y = (torch.where(finite_rows(t)[..., None], t, 0.0) for t in (x, y))
        else:
            x, y = row_normalize(x, kind), row_normalize(y, kind)
        s = x @ y.mT
    return s.abs() if absolute else s


def similarity_pairs(
    x: Tensor,  # (N, K)
    y: Tensor | None,  # (M, K), or None for x with itself
    threshold: float,
    kind: str,
    absolute: bool,
    include_self: bool,
    max_pairs: int,  # -1: all
    recheck: bool,
    precision: str = "fp32",  # may only change how fast the result is found
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # row, col, value (E,), truncated ()
    s = similarity_matrix(x, x if y is None else y, kind, False)
    reaches = (s.abs() if absolute else s) >= threshold
    if y is None:
        reaches = reaches.triu(0 if include_self else 1)
    row, col = reaches.nonzero(as_tuple=True)
    kept = slice(None, None if max_pairs < 0 else max_pairs)
    truncated = torch.tensor(0 <= max_pairs < len(row), device=x.device)
    row, col = row[kept].clone(), col[kept].clone()
    return row, col, s[row, col], truncated


def similarity_topk(
    x: Tensor,
    y: Tensor | None,
    k: int,
    kind: str,
    absolute: bool,
    include_self: bool,
    recheck: bool,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:  # values, indices (N, k): best first, ties by index, then -inf and -1
    s = similarity_matrix(x, x if y is None else y, kind, False)
    n, m = s.shape
    order = torch.argsort(s.abs() if absolute else s, dim=1, descending=True, stable=True)
    if y is None and not include_self:
        itself = order == torch.arange(n, device=x.device)[:, None]
        last = torch.argsort(itself.int(), dim=1, stable=True)  # moves each row itself to the end
        order = order.gather(1, last)[:, : max(m - 1, 0)]
    indices = torch.full((n, k), -1, device=x.device)
    values = s.new_full((n, k), -torch.inf)
    found = order[:, :k]
    indices[:, : found.shape[1]] = found
    values[:, : found.shape[1]] = s.gather(1, found)
    return values, indices


def similarity_clusters(x: Tensor, threshold: float, kind: str, absolute: bool) -> Tensor:  # (N,)
    """Every row takes the smallest label of its neighbours until none changes."""
    s = similarity_matrix(x, x, kind, absolute)
    linked = (s >= threshold).fill_diagonal_(True)
    first = torch.arange(len(x), device=x.device)
    while True:
        nearer = torch.where(linked, first, len(x)).amin(1) if len(x) else first
        if torch.equal(nearer, first):
            labels: Tensor = torch.unique(first, return_inverse=True)[1]
            return labels
        first = nearer


def linear_cka(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """From the N x N Gram matrices, as the definition has it (Kornblith et al. 2019, eq. 1)."""
    return (
        hsic(x @ x.mT, y @ y.mT, debiased)
        / (hsic(x @ x.mT, x @ x.mT, debiased) * hsic(y @ y.mT, y @ y.mT, debiased)).sqrt()
    )


def hsic(gram_x: Tensor, gram_y: Tensor, debiased: bool) -> Tensor:
    """HSIC of two Gram matrices (N, N); the unbiased estimator is Song et al. 2012, eq. 5."""
    n = len(gram_x)
    if not debiased:
        centring = torch.eye(n, dtype=gram_x.dtype, device=gram_x.device) - 1 / n
        return ((centring @ gram_x @ centring) * gram_y).sum() / (n - 1) ** 2
    k = gram_x - gram_x.diag().diag()
    m = gram_y - gram_y.diag().diag()
    trace = (k * m).sum()
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (k.sum(0) @ m.sum(1))
    unbiased: Tensor = (trace + sums - mixed) / (n * (n - 3))
    return unbiased
