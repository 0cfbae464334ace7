"""Normalisation over channels of which some are constants that no longer exist as tensors.

N channels, of which R are removed and K are kept. x' = x_K - m_R is the input shifted by the mean
of the removed constants, so that their own mean is zero; Q_R is their sum of squares about it. The
sum of squares about the joint mean splits into the part within K, within R, and between the two
(Chan, Golub and LeVeque's merge of two samples):

    m = mean(x')    mu = (n_K / N) m    var = (sum (x' - m)^2 + Q_R + (n_K n_R / N) m^2) / N
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The normalised input, r = 1 / standard deviation, and t = -mu r; the last two keep the axis.
Normalised = tuple[Tensor, Tensor, Tensor]


def normalise_composed(
    shifted: Tensor, removed_square: Tensor | float, removed: int, eps: float
) -> Normalised:
    """Differentiated by autograd; what compilers and exporters see."""
    kept = shifted.shape[-1]
    total = kept + removed
    mean = shifted.mean(-1, keepdim=True)
    within = (shifted - mean).square().sum(-1, keepdim=True)
    between = (kept * removed / total) * mean.square()
    r = torch.rsqrt((within + removed_square + between) / total + eps)
    mu = (kept / total) * mean
    return (shifted - mu) * r, r, -mu * r


def normalise(
    shifted: Tensor, removed_square: Tensor | float, removed: int, eps: float
) -> Normalised:
    """Standardises the last axis by the statistics of kept and removed channels together.

    Args:
        shifted: (..., n_K), the kept channels minus the mean of the removed constants.
        removed_square: Q_R, broadcastable to (..., 1).
        removed: n_R, how many values were removed.
        eps: added to the variance.

    Returns:
        ``(x' - mu) r`` of the input's shape, and r and ``-mu r`` of shape (..., 1).
    """
    if torch.compiler.is_compiling():
        return normalise_composed(shifted, removed_square, removed, eps)
    result: Normalised = _Normalise.apply(  # type: ignore[no-untyped-call]
        shifted, removed_square, removed, eps
    )
    return result


class _Normalise(torch.autograd.Function):
    """Keeps its outputs for the backward and nothing else.

    With g, h1, h2 the gradients of the three outputs and y the first of them:
    dx = r (g - (sum g + h2) / N - y / N (sum g y + r h1 + t h2)), N counting removed channels too.
    The backward is made of differentiable operations, so it can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        shifted: Tensor, removed_square: Tensor | float, removed: int, eps: float
    ) -> Normalised:
        return normalise_composed(shifted, removed_square, removed, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Normalised) -> None:
        shifted, _, removed, _ = inputs
        ctx.total = shifted.shape[-1] + removed
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        g, h1, h2 = grads
        y, r, t = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True) + r * h1 + t * h2
        mean = g.sum(-1, keepdim=True) + h2
        return r * (g - mean / ctx.total - y * (along / ctx.total)), None, None, None


def root_mean_square_composed(
    x: Tensor, removed_square: Tensor | float, removed: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Differentiated by autograd; what compilers and exporters see."""
    total = x.shape[-1] + removed
    r = torch.rsqrt((x.square().sum(-1, keepdim=True) + removed_square) / total + eps)
    return x * r, r


def root_mean_square(
    x: Tensor, removed_square: Tensor | float, removed: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Divides the last axis by the root mean square of kept and removed channels together.

    Args:
        x: (..., n_K), the kept channels.
        removed_square: the sum of squares of the removed constants.
        removed: n_R, how many values were removed.
        eps: added to the mean square.

    Returns:
        ``x r`` of the input's shape, and r of shape (..., 1).
    """
    if torch.compiler.is_compiling():
        return root_mean_square_composed(x, removed_square, removed, eps)
    result: tuple[Tensor, Tensor] = _RootMeanSquare.apply(  # type: ignore[no-untyped-call]
        x, removed_square, removed, eps
    )
    return result


class _RootMeanSquare(torch.autograd.Function):
    """dx = r (g - y / N (sum g y + r h)), with g and h the gradients of y = x r and of r."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, removed_square: Tensor | float, removed: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        return root_mean_square_composed(x, removed_square, removed, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, removed, _ = inputs
        ctx.total = x.shape[-1] + removed
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        g, h = grads
        y, r = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True) + r * h
        return r * (g - y * (along / ctx.total)), None, None, None
