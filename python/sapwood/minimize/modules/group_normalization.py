"""GroupNorm over channels of which some were removed as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize.modules._normalizing import (
    Removed,
    check_channels,
    check_cover,
    check_widths,
    copy_affine,
    statistics_dtype,
)
from sapwood.minimize.modules._statistics import normalise

__all__ = ["CompensatedGroupNorm"]


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
        check_widths(where, kept, total)
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
        before = None
        if isinstance(norm, CompensatedGroupNorm):
            before = norm
            groups, width, total = norm.groups, norm.kept, norm.total
        else:
            groups, width, total = norm.num_groups, norm.num_channels, norm.num_channels
        keep = check_cover(where, keep, constants, width)
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
            gone = Removed.of(values).merged(before.removed(group) if before else Removed())
            small.removed_mean[group] = gone.mean
            small.removed_square[group] = gone.square
        copy_affine(norm, small, keep)
        return small.train(norm.training)

    def removed(self, group: int) -> Removed:
        """The constants of one group that the buffers describe."""
        count = (self.total - self.kept) // self.groups
        mean, square = self.removed_mean[group].item(), self.removed_square[group].item()
        return Removed(count, mean, square)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, kept, ...) -> the same shape."""
        check_channels("CompensatedGroupNorm", input, 1, self.kept)
        wide = statistics_dtype(input)
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
