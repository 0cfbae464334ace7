"""What the compensated norms share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sapwood import _check


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y * weight + bias`` along the last axis, as far as there are any."""
    if weight is None:
        return y
    return y * weight if bias is None else torch.addcmul(bias, y, weight)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics are computed in, as torch\'s own norms do."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


@dataclass(frozen=True)
class Removed:
    """Constants that were removed: how many, their mean and their sum of squares about it."""

    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    @classmethod
    def of(cls, constants: Tensor) -> Removed:
        """Of constants, in float64."""
        values = constants.detach().double()
        if len(values) == 0:
            return cls()
        mean = values.mean().item()
        return cls(len(values), mean, (values - mean).square().sum().item())

    def merged(self, other: Removed) -> Removed:
        """Of both together."""
        count = self.count + other.count
        if count == 0:
            return self
        between = self.count * other.count / count * (self.mean - other.mean) ** 2
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Removed(count, mean, self.square + other.square + between)


def copy_affine(norm: nn.Module, small: nn.Module, keep: Tensor) -> None:
    """Gives ``small`` the kept entries of weight and bias."""
    for name in ("weight", "bias"):
        source, target = getattr(norm, name, None), getattr(small, name, None)
        if source is not None and target is not None:
            index = keep.to(source.device)
            setattr(small, name, nn.Parameter(source.detach()[index], source.requires_grad))


def check_widths(where: str, kept: int, total: int) -> None:
    """ValueError unless 1 <= kept <= total."""
    if kept < 1:
        _check.fail(ValueError, where, "kept", "be at least 1", kept)
    if total < kept:
        _check.fail(ValueError, where, "total", f"not be below kept {kept}", total)


def check_cover(where: str, keep: Tensor, constants: Tensor, width: int) -> Tensor:
    """``keep`` as int64, if it and the constants account for every channel."""
    if len(keep) + len(constants) != width:
        expected = f"have one entry for each of the {width - len(keep)} removed channels"
        _check.fail(ValueError, where, "constants", expected, len(constants))
    if len(keep) and not bool(((keep >= 0) & (keep < width)).all()):
        _check.fail(ValueError, where, "keep", f"lie in [0, {width})", keep.tolist())
    return keep.long()


def check_channels(where: str, x: Tensor, axis: int, kept: int) -> None:
    """ValueError unless the input has ``kept`` channels."""
    if x.dim() <= max(axis, 0) or x.shape[axis] != kept:
        expected = f"have {kept} channels on axis {axis}"
        _check.fail(ValueError, where, "input", expected, f"shape {tuple(x.shape)}")
