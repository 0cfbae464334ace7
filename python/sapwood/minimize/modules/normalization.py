"""LayerNorm and RMSNorm over channels of which some were removed as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize.modules._normalizing import (
    Removed,
    affine,
    check_channels,
    check_cover,
    check_widths,
    copy_affine,
    statistics_dtype,
)
from sapwood.minimize.modules._statistics import normalise, root_mean_square

__all__ = ["CompensatedLayerNorm", "CompensatedRMSNorm"]

_TAILS = ("none", "mean", "both")


class CompensatedLayerNorm(nn.Module):
    """LayerNorm over ``total`` channels of which only ``kept`` still exist as tensors.

    The removed channels held one constant each. They entered mean and variance, so dropping them
    would change the output; their mean and their sum of squares about it replace them exactly.

    Example:
        >>> import torch
        >>> from sapwood.minimize import CompensatedLayerNorm
        >>> norm = torch.nn.LayerNorm(4)
        >>> x = torch.tensor([[1.0, 5.0, 3.0, 7.0]])       # channels 1 and 3 are always 5 and 7
        >>> keep, constants = torch.tensor([0, 2]), torch.tensor([5.0, 7.0])
        >>> small = CompensatedLayerNorm.from_norm(norm, keep, constants)
        >>> torch.allclose(small(x[:, keep]), norm(x)[:, keep])
        True

    The output of a removed channel r, ``gamma_r (c_r - m_R - mu) / s + beta_r``, is not a constant,
    since the mean mu and the standard deviation s depend on the channels that live. For a reader
    that is linear per token it has rank two; ``tail`` appends the features that carry it: 1 / s and
    ``-mu / s`` (``"both"``) or the second alone (``"mean"``).

    Args:
        kept: n_K, channels of the input; at least 1.
        total: N, channels of the original; not below ``kept``.
        eps: added to the variance.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias, given ``elementwise_affine``.
        tail: ``"none"``, ``"mean"`` or ``"both"``: the features appended to the output.
        channels_first: the channel axis is 1 instead of the last.
        device: as ``nn.LayerNorm``.
        dtype: as ``nn.LayerNorm``.

    The buffers ``removed_mean`` m_R and ``removed_square`` Q_R (both scalars) start at 0. Inputs of
    float16 and bfloat16 are normalised in float32, as ``nn.LayerNorm`` does.

    Raises:
        ValueError: if ``kept`` or ``total`` is out of range or ``tail`` unknown; in ``forward``, if
            the channel axis has not ``kept`` entries.

    References:
        Our derivation for the contract of Squeeze-Release, arXiv:2606.14346; the variance is Chan,
        Golub and LeVeque's merge of two samples.
    """

    removed_mean: Tensor
    removed_square: Tensor

    def __init__(
        self,
        kept: int,
        total: int,
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        tail: str = "none",
        channels_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_widths("CompensatedLayerNorm", kept, total)
        _check.one_of("CompensatedLayerNorm", "tail", tail, _TAILS)
        self.kept, self.total, self.eps = kept, total, eps
        self.tail, self.channels_first = tail, channels_first
        kwargs = {"device": device, "dtype": dtype}
        bias = bias and elementwise_affine
        self.weight = nn.Parameter(torch.ones(kept, **kwargs)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(kept, **kwargs)) if bias else None
        self.register_buffer("removed_mean", torch.zeros((), **kwargs))
        self.register_buffer("removed_square", torch.zeros((), **kwargs))

    @classmethod
    def from_norm(
        cls,
        norm: nn.LayerNorm | CompensatedLayerNorm,
        keep: Tensor,
        constants: Tensor,
        *,
        tail: str = "none",
        channels_first: bool | None = None,
    ) -> CompensatedLayerNorm:
        """Removes further channels of a norm over one axis.

        Args:
            norm: the layer; its parameters are copied.
            keep: (n_K,) integer, the channels of its input that stay.
            constants: (n_R,), the values of the other channels, in their order.
            tail: the features of the result. Where ``norm`` had a tail already, its meaning moves
                with the mean of the removed constants: see ``removed_mean``.
            channels_first: None takes it from ``norm``.

        Returns:
            The narrower norm, in the mode of ``norm``.

        Raises:
            ValueError: if the norm has several axes, or ``keep`` and ``constants`` do not cover its
                channels.
        """
        width = _norm_width("CompensatedLayerNorm.from_norm", norm)
        keep = check_cover("CompensatedLayerNorm.from_norm", keep, constants, width)
        before = norm if isinstance(norm, CompensatedLayerNorm) else None
        like = norm.weight if norm.weight is not None else constants
        small = cls(
            len(keep),
            before.total if before else width,
            norm.eps,
            elementwise_affine=norm.weight is not None,
            bias=norm.bias is not None,
            tail=tail,
            channels_first=bool(before and before.channels_first)
            if channels_first is None
            else channels_first,
            device=like.device,
            dtype=like.dtype,
        )
        removed = Removed.of(constants).merged(before.removed if before else Removed())
        small.removed_mean.fill_(removed.mean)
        small.removed_square.fill_(removed.square)
        copy_affine(norm, small, keep)
        return small.train(norm.training)

    @property
    def removed(self) -> Removed:
        """The constants that the buffers describe."""
        count = self.total - self.kept
        return Removed(count, self.removed_mean.item(), self.removed_square.item())

    def forward(self, input: Tensor) -> Tensor:
        """(..., kept) -> (..., kept + tail features); with ``channels_first`` along axis 1."""
        axis = 1 if self.channels_first else -1
        check_channels("CompensatedLayerNorm", input, axis, self.kept)
        x = input.movedim(1, -1) if self.channels_first else input
        wide = statistics_dtype(x)
        shifted = x.to(wide) - self.removed_mean.to(wide)
        removed = self.total - self.kept
        y, r, t = normalise(shifted, self.removed_square.to(wide), removed, self.eps)
        y = affine(y, self.weight, self.bias)
        if self.tail != "none":
            y = torch.cat((y, r, t) if self.tail == "both" else (y, t), -1)
        y = y.to(input.dtype)
        return y.movedim(-1, 1) if self.channels_first else y

    def extra_repr(self) -> str:
        return (
            f"kept={self.kept}, total={self.total}, eps={self.eps}, tail={self.tail!r}, "
            f"channels_first={self.channels_first}, affine={self.weight is not None}"
        )


class CompensatedRMSNorm(nn.Module):
    """RMSNorm over ``total`` channels of which only ``kept`` still exist as tensors.

    Example:
        >>> import torch
        >>> from sapwood.minimize import CompensatedRMSNorm
        >>> norm = torch.nn.RMSNorm(4, eps=1e-6)
        >>> x = torch.tensor([[1.0, 5.0, 3.0, 7.0]])       # channels 1 and 3 are always 5 and 7
        >>> keep, constants = torch.tensor([0, 2]), torch.tensor([5.0, 7.0])
        >>> small = CompensatedRMSNorm.from_norm(norm, keep, constants)
        >>> torch.allclose(small(x[:, keep]), norm(x)[:, keep])
        True

    The output of a removed channel is ``gamma_r c_r / rms``; ``tail`` appends the feature 1 / rms
    that carries it to a linear reader.

    Args:
        kept: n_K, channels of the input; at least 1.
        total: N, channels of the original; not below ``kept``.
        eps: added to the mean square; None is the machine epsilon of the input's dtype, as in
            ``nn.RMSNorm``.
        elementwise_affine: whether there is a weight.
        tail: whether 1 / rms is appended to the output.
        device: as ``nn.RMSNorm``.
        dtype: as ``nn.RMSNorm``.

    The scalar buffer ``removed_square``, the sum of squares of the removed constants, starts at 0.

    Raises:
        ValueError: if ``kept`` or ``total`` is out of range; in ``forward``, if the last axis has
            not ``kept`` entries.

    References:
        Our derivation for the contract of Squeeze-Release, arXiv:2606.14346.
    """

    removed_square: Tensor

    def __init__(
        self,
        kept: int,
        total: int,
        eps: float | None = None,
        *,
        elementwise_affine: bool = True,
        tail: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_widths("CompensatedRMSNorm", kept, total)
        self.kept, self.total, self.eps, self.tail = kept, total, eps, tail
        kwargs = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(kept, **kwargs)) if elementwise_affine else None
        self.register_buffer("removed_square", torch.zeros((), **kwargs))

    @classmethod
    def from_norm(
        cls,
        norm: nn.RMSNorm | CompensatedRMSNorm,
        keep: Tensor,
        constants: Tensor,
        *,
        tail: bool = False,
    ) -> CompensatedRMSNorm:
        """Removes further channels of a norm over one axis.

        Args:
            norm: the layer; its weight is copied.
            keep: (n_K,) integer, the channels of its input that stay.
            constants: (n_R,), the values of the other channels.
            tail: whether the result appends 1 / rms.

        Returns:
            The narrower norm, in the mode of ``norm``.

        Raises:
            ValueError: if the norm has several axes, or ``keep`` and ``constants`` do not cover its
                channels.
        """
        width = _norm_width("CompensatedRMSNorm.from_norm", norm)
        keep = check_cover("CompensatedRMSNorm.from_norm", keep, constants, width)
        before = norm if isinstance(norm, CompensatedRMSNorm) else None
        like = norm.weight if norm.weight is not None else constants
        small = cls(
            len(keep),
            before.total if before else width,
            norm.eps,
            elementwise_affine=norm.weight is not None,
            tail=tail,
            device=like.device,
            dtype=like.dtype,
        )
        earlier = before.removed_square.item() if before else 0.0
        small.removed_square.fill_(earlier + constants.double().square().sum().item())
        copy_affine(norm, small, keep)
        return small.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., kept) -> (..., kept), or (..., kept + 1) with the tail."""
        check_channels("CompensatedRMSNorm", input, -1, self.kept)
        wide = statistics_dtype(input)
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        square, removed = self.removed_square.to(wide), self.total - self.kept
        y, r = root_mean_square(input.to(wide), square, removed, eps)
        y = affine(y, self.weight, None)
        return (torch.cat((y, r), -1) if self.tail else y).to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"kept={self.kept}, total={self.total}, eps={self.eps}, tail={self.tail}, "
            f"affine={self.weight is not None}"
        )


def _norm_width(where: str, norm: nn.Module) -> int:
    """Channels of a norm over one axis."""
    if isinstance(norm, (CompensatedLayerNorm, CompensatedRMSNorm)):
        return norm.kept
    shape: tuple[int, ...] = getattr(norm, "normalized_shape", ())
    if len(shape) != 1:
        _check.fail(ValueError, where, "norm", "normalise one axis", f"normalized_shape {shape}")
    return int(shape[0])
