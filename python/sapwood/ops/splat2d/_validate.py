"""What the ops of the family check, and how leading dimensions become one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood import _check, _register
from sapwood.reference import splat2d as reference

#: q at which the weight of a pixel has fallen to 1/255: 3.33 standard deviations.
DEFAULT_CUTOFF = 2 * math.log(255)

MODES = ("sum", "norm")
_FLOATS = (torch.float32, torch.float64)
#: Up to this a pixel's coordinates are exact in float32.
_LARGEST = 1 << 24


@dataclass(frozen=True)
class Scene:
    """Checked arguments with one batch dimension, and the leading shape of the result."""

    mu: Tensor  # (B, N, 2)
    chol: Tensor  # (B, N, 3)
    feat: Tensor  # (B, N, C)
    counts: Tensor | None  # (B,)
    lead: tuple[int, ...]

    def restore(self, result: Tensor) -> Tensor:
        """Gives (B, ...) the leading dimensions of the arguments."""
        if len(self.lead) == 1:
            return result
        return result.squeeze(0) if not self.lead else result.unflatten(0, self.lead)


def size_of(op: str, size: Sequence[int]) -> tuple[int, int]:
    """(H, W), both at least 1."""
    if isinstance(size, Tensor) or not isinstance(size, Sequence) or len(size) != 2:
        _check.fail(TypeError, op, "size", "be a pair (height, width)", repr(size))
    height, width = size
    for value in (height, width):
        if isinstance(value, (bool, float)):
            _check.fail(TypeError, op, "size", "be a pair of integers", repr(size))
    if height < 1 or width < 1:
        _check.fail(ValueError, op, "size", "be at least (1, 1)", (height, width))
    if height > _LARGEST or width > _LARGEST:
        most = (_LARGEST, _LARGEST)
        _check.fail(ValueError, op, "size", f"be at most {most}", (height, width))
    return height, width


def cutoff_of(op: str, cutoff: float) -> float:
    """A positive number; inf disables the cut."""
    if not cutoff > 0:
        _check.fail(ValueError, op, "cutoff", "be positive", cutoff)
    return float(cutoff)


def eps_of(op: str, eps: float) -> float:
    if not 0 < eps < math.inf:
        _check.fail(ValueError, op, "eps", "be positive and finite", eps)
    return float(eps)


def scene(
    op: str,
    mu: Tensor,
    chol: Tensor,
    feat: Tensor,
    counts: Tensor | None,
    validate: bool | None,
) -> Scene:
    """Checks the Gaussians; leading dimensions broadcast and are flattened."""
    named = {"mu": mu, "chol": chol, "feat": feat}
    for name, t in named.items():
        _check.tensor(op, name, t)
        _check.floating(op, name, t)
    _check.same_device(op, **named, counts=counts)
    mu, chol, feat = _same_type(op, mu, chol, feat)
    _check_shapes(op, mu, chol, feat)
    try:
        lead = tuple(torch.broadcast_shapes(mu.shape[:-2], chol.shape[:-2], feat.shape[:-2]))
    except RuntimeError:
        given = tuple(tuple(t.shape[:-2]) for t in (mu, chol, feat))
        _check.fail(
            ValueError, op, "mu, chol and feat", "have leading dimensions that broadcast", given
        )
    if counts is not None:
        counts = _batched_counts(op, counts, lead)
    flat = [_batched(t, lead) for t in (mu, chol, feat)]
    made = Scene(flat[0], flat[1], flat[2], counts, lead)
    if validate or (validate is None and mu.device.type == "cpu" and _may_look()):
        _check_values(op, made)
    return made


def _may_look() -> bool:
    """Whether tensors hold values that Python may branch on."""
    return not (torch.compiler.is_compiling() or _register.transforms_active())


def _same_type(op: str, mu: Tensor, chol: Tensor, feat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in mu's dtype; half precision is taken under autocast only, and widened."""
    device = mu.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        mu, chol, feat = (reference.widened(t) for t in (mu, chol, feat))
    _check.dtype(op, "mu", mu, _FLOATS)
    for name, t in (("chol", chol), ("feat", feat)):
        if t.dtype != mu.dtype:
            raise RuntimeError(
                f"sapwood.{op}: {name} must have mu's dtype {mu.dtype}, got {t.dtype}"
            )
    return mu, chol, feat


def _check_shapes(op: str, mu: Tensor, chol: Tensor, feat: Tensor) -> None:
    for name, t in (("mu", mu), ("chol", chol), ("feat", feat)):
        if t.dim() < 2:
            _check.fail(
                ValueError, op, name, "have at least 2 dimensions", f"shape {tuple(t.shape)}"
            )
    n = mu.shape[-2]
    for name, t, last in (("mu", mu, 2), ("chol", chol, 3)):
        if tuple(t.shape[-2:]) != (n, last):
            wanted = (*t.shape[:-2], n, last)
            _check.fail(
                ValueError, op, name, f"have shape (..., N, {last}) = {wanted}", tuple(t.shape)
            )
    if feat.shape[-2] != n or feat.shape[-1] < 1:
        wanted = (*feat.shape[:-2], n, max(1, feat.shape[-1]))
        _check.fail(ValueError, op, "feat", f"have shape (..., N, C) = {wanted}", tuple(feat.shape))


def _batched(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    if len(lead) == 1 and t.shape[:-2] == lead:
        return t
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), *t.shape[-2:])


def _batched_counts(op: str, counts: Tensor, lead: tuple[int, ...]) -> Tensor:
    _check.tensor(op, "counts", counts)
    _check.dtype(op, "counts", counts, (torch.int64,))
    try:
        return counts.expand(lead).reshape(math.prod(lead))
    except RuntimeError:
        _check.fail(
            ValueError, op, "counts", f"broadcast to the leading shape {lead}", tuple(counts.shape)
        )


def _check_values(op: str, given: Scene) -> None:
    for name, t in (("mu", given.mu), ("chol", given.chol), ("feat", given.feat)):
        values = t.detach()
        # One pass over the data where isfinite takes three; the sum itself may overflow.
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            _check.fail(ValueError, op, name, "be finite", _first_bad(values))
    diagonal = given.chol.detach()[..., ::2]
    if diagonal.numel() and not float(diagonal.amin()) > 0:
        _check.fail(ValueError, op, "chol", "have l1 > 0 and l3 > 0", float(diagonal.amin()))
    if given.counts is not None and given.counts.numel():
        n = given.mu.shape[-2]
        low, high = (int(t) for t in given.counts.aminmax())
        if low < 0 or high > n:
            _check.fail(ValueError, op, "counts", f"be in [0, {n}]", low if low < 0 else high)


def _first_bad(values: Tensor) -> str:
    at = (~values.isfinite()).nonzero()[0].tolist()
    return f"{float(values[tuple(at)])} at {tuple(at)}"
