"""The op that stands in for F.linear while masks and weights change."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops._autocast import autocast
from sapwood.ops.masked_matmul import _specs, _triton
from sapwood.reference import masked_matmul as reference

_NAME = "masked_matmul"
_GRADS = ("masked", "dense")


def _reference_why_not(
    x: Tensor, weight: Tensor, mask: Tensor, weight_grad: str = "masked"
) -> str | None:
    return None if weight_grad == "masked" else "its weight gradient is always masked"


_BACKENDS = (
    _backend.native(_NAME, _specs.masked_matmul),
    _backend.Backend("triton", _triton.why_not, _triton.masked_matmul),
    _backend.Backend("reference", _reference_why_not, reference.masked_matmul),
)


def as_flat(x: Tensor, features: int) -> Tensor:
    """(*, K) -> (B, K); spelled out because -1 is ambiguous when K is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), features)


def _checked(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, weight_grad: str
) -> None:
    _check.dims(_NAME, "weight", weight, 2)
    _check.last_dim(_NAME, "input", input, weight.shape[1], "weight's columns")
    _check.shape(_NAME, "mask", mask, weight.shape, "weight")
    _check.floating(_NAME, "weight", weight)
    _check.same_dtype(_NAME, "input", input, "weight", weight)
    if not mask.is_floating_point() or not torch.is_autocast_enabled(mask.device.type):
        _check.dtype(_NAME, "mask", mask, (torch.bool, torch.uint8, weight.dtype))
    if bias is not None:
        _check.shape(_NAME, "bias", bias, weight.shape[:1])
        _check.same_dtype(_NAME, "bias", bias, "weight", weight)
    _check.one_of(_NAME, "weight_grad", weight_grad, _GRADS)
    on_one = input.device == weight.device == mask.device
    if not on_one or (bias is not None and bias.device != input.device):
        _check.same_device(_NAME, input=input, weight=weight, mask=mask, bias=bias)


def _explain(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    weight_grad: str = "masked",
) -> _backend.Explanation:
    if mask.is_floating_point():
        lines = (
            _backend.Candidate("dense", None),
            _backend.Candidate("native", "a floating (soft) mask is a product of two tensors"),
        )
        return _backend.Explanation(_NAME, lines)
    candidates = _backend.candidates(_BACKENDS, input, weight, mask, weight_grad)
    return _backend.Explanation(_NAME, candidates)


@_backend.explainable(_explain)
def masked_matmul(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    weight_grad: str = "masked",
) -> Tensor:
    """Linear layer with a masked weight: ``input @ (weight o mask).T + bias``.

    Example::

        x, w = torch.randn(32, 64), torch.randn(128, 64, requires_grad=True)
        y = sapwood.ops.masked_matmul(x, w, torch.rand(128, 64) > 0.9)   # (32, 128)

    Stands in for ``F.linear(input, weight * mask, bias)`` in training: no product is kept for the
    backward pass, and entries that are masked out get an exactly zero gradient. With a bool or
    uint8 mask a NaN or inf in a masked-out weight does not leak. The product itself is dense
    (predictable in speed); for a mask that stays, :func:`pack_sparse` is the faster way.

    Args:
        input: (*, K) floating point; leading dimensions are batch.
        weight: (N, K), dtype of ``input``.
        mask: (N, K) bool or uint8 (non-zero keeps), or the dtype of ``weight``: then a soft mask,
            multiplied, with gradients to both. Never broadcast.
        bias: (N,) or None.
        weight_grad: "masked" (zero where masked out) or "dense" (the full dY^T X, as RigL's growth
            and straight-through training need it).

    Returns:
        (*, N), dtype of ``input``; under autocast the autocast dtype, as ``F.linear``.

    Raises:
        ValueError: for shapes that do not match or an unknown ``weight_grad``.
        TypeError: for non-tensors and dtypes other than the above.
        RuntimeError: for tensors on different devices.
    """
    _check.tensor(_NAME, "input", input)
    _check.tensor(_NAME, "weight", weight)
    _check.tensor(_NAME, "mask", mask)
    if bias is not None:
        _check.tensor(_NAME, "bias", bias)
    x, w, b = autocast(input, weight, bias)
    _checked(x, w, mask, b, weight_grad)
    if mask.is_floating_point():
        return F.linear(x, w * mask.to(w.dtype), b)
    if mask.dtype == torch.uint8:
        mask = mask != 0
    flat = as_flat(x, w.shape[1])
    chosen = _backend.choose(_NAME, _BACKENDS, flat, w, mask, weight_grad)
    y: Tensor = chosen.run(flat, w, mask, b, weight_grad == "dense")
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w.shape[0])
