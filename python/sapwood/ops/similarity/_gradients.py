"""Gradients of selected similarities: by torch, from the rows of the pairs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.ops.similarity import _specs
from sapwood.reference import similarity as reference


def wanted(*tensors: Tensor | None) -> bool:
    """Whether values must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attach(
    values: Tensor,  # (E,)
    x: Tensor,  # (N, K)
    y: Tensor | None,  # (M, K)
    row: Tensor,  # (E,)
    col: Tensor,  # (E,), -1 for padding
    kind: str,
) -> Tensor:
    """The values, with the gradient of the similarity of their pairs.

    Gathers E rows of each side; their gradients are added in the order of the pairs. Nothing is
    N x M, and the choice of the pairs is not differentiated.
    """
    present = col >= 0
    if not present.numel() or not (len(x) and len(x if y is None else y)):
        return values
    x = reference.widened(x)
    y = x if y is None else reference.widened(y)
    finite_x, finite_y = reference.finite_rows(x), reference.finite_rows(y)
    if kind in reference.UNIT_KINDS:
        unit_x = _specs.row_normalize(x, kind)
        unit_y = unit_x if y is x else _specs.row_normalize(y, kind)
    else:
        unit_x, unit_y = (
            torch.where(f[:, None], t, 0.0) for f, t in ((finite_x, x), (finite_y, y))
        )
    col = col.clamp_min(0)
    a, b = unit_x[row], unit_y[col]
    if kind == "euclidean":
        present = present & finite_x[row] & finite_y[col]
        differentiable = -(a - b).square().sum(-1)
    else:
        differentiable = (a * b).sum(-1)
    # The forward values stay those of the kernel: only the gradient is taken from here.
    return values + torch.where(present, differentiable - differentiable.detach(), 0.0)
