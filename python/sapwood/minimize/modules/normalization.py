"""LayerNorm, RMSNorm and GroupNorm over channels of which some were removed as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize.modules._statistics import normalise, root_mean_square

__all__ = ["CompensatedGroupNorm", "CompensatedLayerNorm", "CompensatedRMSNorm"]

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
        _check_widths("CompensatedLayerNorm", kept, total)
        _check.one_of("CompensatedLayerNorm", "tail", tail, _TAILS)
        self.kept, self.total, self.eps = kept, total, eps
        self.tail, self.channels_first = tail, channels_first
        kwargs = {"device": device, "dtype": dtype}
        affine = elementwise_affine
        self.weight = nn.Parameter(torch.ones(kept, **kwargs)) if affine else None
        self.bias = nn.Parameter(torch.zeros(kept, **kwargs)) if affine and bias else None
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
        keep = _check_cover("CompensatedLayerNorm.from_norm", keep, constants, width)
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
        mean, square = _merged(constants, before)
        small.removed_mean.fill_(mean)
        small.removed_square.fill_(square)
        _copy_affine(norm, small, keep)
        return small.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., kept) -> (..., kept + tail features); with ``channels_first`` along axis 1."""
        axis = 1 if self.channels_first else -1
        _check_channels("CompensatedLayerNorm", input, axis, self.kept)
        x = input.movedim(1, -1) if self.channels_first else input
        wide = _statistics_dtype(x)
        shifted = x.to(wide) - self.removed_mean.to(wide)
        removed = self.total - self.kept
        y, r, t = normalise(shifted, self.removed_square.to(wide), removed, self.eps)
        y = _affine(y, self.weight, self.bias)
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
        _check_widths("CompensatedRMSNorm", kept, total)
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
        keep = _check_cover("CompensatedRMSNorm.from_norm", keep, constants, width)
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
        _copy_affine(norm, small, keep)
        return small.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., kept) -> (..., kept), or (..., kept + 1) with the tail."""
        _check_channels("CompensatedRMSNorm", input, -1, self.kept)
        wide = _statistics_dtype(input)
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        square, removed = self.removed_square.to(wide), self.total - self.kept
        y, r = root_mean_square(input.to(wide), square, removed, eps)
        y = _affine(y, self.weight, None)
        return (torch.cat((y, r), -1) if self.tail else y).to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"kept={self.kept}, total={self.total}, eps={self.eps}, tail={self.tail}, "
            f"affine={self.weight is not None}"
        )


class CompensatedGroupNorm(nn.Module):
    """GroupNorm of which every group lost the same number of channels, each of them a constant.

    Example:
        >>> import torch
        >>> from sapwood.minimize import CompensatedGroupNorm
        >>> norm = torch.nn.GroupNorm(2, 4)
        >>> x = torch.randn(3, 4, 5, 5)
        >>> x[:, 1], x[:, 2] = 0.5, -2.0                   # one constant channel in each group
        >>> keep, constants = torch.tensor([0, 3]), torch.tensor([0.5, -2.0])
        >>> small = CompensatedGroupNorm.from_norm(norm, keep, constants)
        >>> torch.allclose(small(x[:, keep]), norm(x)[:, keep], atol=1e-6)
        True

    Args:
        groups: the number of groups.
        kept: channels of the input, a multiple of ``groups``.
        total: channels of the original, a multiple of ``groups``, not below ``kept``.
        eps: added to the variance.
        affine: whether there are weight and bias.
        device: as ``nn.GroupNorm``.
        dtype: as ``nn.GroupNorm``.

    The buffers ``removed_mean`` and ``removed_square`` ((groups,) each) start at 0.

    Raises:
        ValueError: if a width is out of range or does not divide by ``groups``; in ``forward``, if
            axis 1 has not ``kept`` entries.

    References:
        Our derivation for the contract of Squeeze-Release, arXiv:2606.14346.
    """

    removed_mean: Tensor
    removed_square: Tensor

    def __init__(
        self,
        groups: int,
        kept: int,
        total: int,
        eps: float = 1e-5,
        *,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = "CompensatedGroupNorm"
        _check_widths(where, kept, total)
        for name, width in (("kept", kept), ("total", total)):
            if groups < 1 or width % groups:
                _check.fail(ValueError, where, name, f"be a multiple of groups {groups}", width)
        self.groups, self.kept, self.total, self.eps = groups, kept, total, eps
        kwargs = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(kept, **kwargs)) if affine else None
        self.bias = nn.Parameter(torch.zeros(kept, **kwargs)) if affine else None
        self.register_buffer("removed_mean", torch.zeros(groups, **kwargs))
        self.register_buffer("removed_square", torch.zeros(groups, **kwargs))

    @classmethod
    def from_norm(
        cls, norm: nn.GroupNorm | CompensatedGroupNorm, keep: Tensor, constants: Tensor
    ) -> CompensatedGroupNorm:
        """Removes further channels of a norm.

        Args:
            norm: the layer; its parameters are copied.
            keep: (n_K,) integer, ascending, the same number from every group.
            constants: (n_R,), the values of the other channels, in their order.

        Returns:
            The narrower norm, in the mode of ``norm``.

        Raises:
            ValueError: if ``keep`` and ``constants`` do not cover the channels, or the groups
                would become uneven.
        """
        where = "CompensatedGroupNorm.from_norm"
        before = norm if isinstance(norm, CompensatedGroupNorm) else None
        groups, width, total = (
            (before.groups, before.kept, before.total)
            if before
            else (norm.num_groups, norm.num_channels, norm.num_channels)  # type: ignore[union-attr]
        )
        keep = _check_cover(where, keep, constants, width)
        removed = torch.ones(width, dtype=torch.bool)
        removed[keep] = False
        per_group = removed.view(groups, -1).sum(1)
        if per_group.unique().numel() > 1:
            expected = "take the same number of channels from every group"
            _check.fail(ValueError, where, "keep", expected, (width // groups - per_group).tolist())
        like = norm.weight if norm.weight is not None else constants
        small = cls(
            groups,
            len(keep),
            total,
            norm.eps,
            affine=norm.weight is not None,
            device=like.device,
            dtype=like.dtype,
        )
        for group, values in enumerate(constants.view(groups, -1)):
            mean, square = _merged(values, before, group)
            small.removed_mean[group] = mean
            small.removed_square[group] = square
        _copy_affine(norm, small, keep)
        return small.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, kept, ...) -> the same shape."""
        _check_channels("CompensatedGroupNorm", input, 1, self.kept)
        wide = _statistics_dtype(input)
        grouped = input.to(wide).reshape(input.shape[0], self.groups, -1)
        places = input.shape[2:].numel()
        shifted = grouped - self.removed_mean.to(wide)[:, None]
        square = self.removed_square.to(wide)[:, None] * places
        removed = (self.total - self.kept) // self.groups * places
        y, _, _ = normalise(shifted, square, removed, self.eps)
        y = y.reshape(input.shape[0], self.kept, places)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias[:, None], y, self.weight[:, None])
        return y.reshape(input.shape).to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, kept={self.kept}, total={self.total}, eps={self.eps}, "
            f"affine={self.weight is not None}"
        )


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return y
    return y * weight if bias is None else torch.addcmul(bias, y, weight)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _merged(
    constants: Tensor, before: CompensatedLayerNorm | CompensatedGroupNorm | None, group: int = 0
) -> tuple[float, float]:
    """Mean and sum of squares about it of newly and earlier removed constants, in float64."""
    values = constants.detach().double()
    count = len(values)
    mean = values.mean().item() if count else 0.0
    square = (values - mean).square().sum().item()
    if before is None:
        return mean, square
    groups = before.groups if isinstance(before, CompensatedGroupNorm) else 1
    earlier = (before.total - before.kept) // groups
    if earlier == 0:
        return mean, square
    old_mean = before.removed_mean.detach().double().view(-1)[group].item()
    old_square = before.removed_square.detach().double().view(-1)[group].item()
    both = count + earlier
    between = count * earlier / both * (mean - old_mean) ** 2
    return (count * mean + earlier * old_mean) / both, square + old_square + between


def _copy_affine(norm: nn.Module, small: nn.Module, keep: Tensor) -> None:
    for name in ("weight", "bias"):
        source, target = getattr(norm, name, None), getattr(small, name, None)
        if source is not None and target is not None:
            index = keep.to(source.device)
            setattr(small, name, nn.Parameter(source.detach()[index], source.requires_grad))


def _norm_width(where: str, norm: nn.Module) -> int:
    if isinstance(norm, (CompensatedLayerNorm, CompensatedRMSNorm)):
        return norm.kept
    shape = getattr(norm, "normalized_shape", ())
    if len(shape) != 1:
        _check.fail(ValueError, where, "norm", "normalise one axis", f"normalized_shape {shape}")
    return int(shape[0])


def _check_widths(where: str, kept: int, total: int) -> None:
    if kept < 1:
        _check.fail(ValueError, where, "kept", "be at least 1", kept)
    if total < kept:
        _check.fail(ValueError, where, "total", f"not be below kept {kept}", total)


def _check_cover(where: str, keep: Tensor, constants: Tensor, width: int) -> Tensor:
    if len(keep) + len(constants) != width:
        expected = f"have one entry for each of the {width - len(keep)} removed channels"
        _check.fail(ValueError, where, "constants", expected, len(constants))
    if len(keep) and not bool(((keep >= 0) & (keep < width)).all()):
        _check.fail(ValueError, where, "keep", f"lie in [0, {width})", keep.tolist())
    return keep.long()


def _check_channels(where: str, x: Tensor, axis: int, kept: int) -> None:
    if x.dim() <= max(axis, 0) or x.shape[axis] != kept:
        expected = f"have {kept} channels on axis {axis}"
        _check.fail(ValueError, where, "input", expected, f"shape {tuple(x.shape)}")
