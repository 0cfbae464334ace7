"""Which elements are the k smallest of several tensors, exactly and in little memory.

Floats become integers of the same order, and the k-th smallest is found digit by digit: a pass
counts the top 16 bits of all elements, the next one the following 16 bits of the elements in the
chosen bin, and so on. One last pass compares with the threshold and resolves ties by position.
Nothing is sorted or concatenated, the tensors are walked in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements per chunk: a few temporaries of 2 or 4 MiB, which the caches of a CPU still like.
CHUNK = 1 << 19

_DIGIT_BITS = 16
_BINS = 1 << _DIGIT_BITS
_WIDE = torch.float64


@dataclass(frozen=True)
class Layer:
    """One tensor to choose from: its scores and, where some are off already, what is active."""

    name: str
    scores: Tensor  # (numel,) floating point
    active: Tensor | None  # (numel,) bool; None: all of them

    def inactive(self) -> int:
        """Number of elements that are off already."""
        if self.active is None:
            return 0
        return self.active.numel() - int(self.active.count_nonzero())


def smallest(layers: Sequence[Layer], k: int) -> list[Tensor]:
    """Keep masks (numel,) with exactly the first ``k`` elements off.

    The order is (inactive first, score, position in ``layers``, flat index); -0.0 equals 0.0.
    Scores must not hold NaN, and ``k`` must cover the inactive elements.
    """
    wide = any(layer.scores.dtype == _WIDE for layer in layers)
    keep = [
        torch.ones(layer.scores.shape, dtype=torch.bool, device=layer.scores.device)
        if layer.active is None
        else layer.active.clone()
        for layer in layers
    ]
    k -= sum(layer.inactive() for layer in layers)
    if k == 0:
        return keep
    threshold, ties_off, ties = _kth(layers, k, wide)
    for layer, mask in zip(layers, keep, strict=True):
        for chunk in _chunks(layer):
            keys = _keys(layer.scores[chunk], wide)
            # with every tie off the comparison decides alone; else the first ties are marked below
            above = keys > threshold if ties_off == ties else keys >= threshold
            if 0 < ties_off < ties:
                tied = ((keys == threshold) & mask[chunk]).nonzero().flatten()[:ties_off]
                above[tied] = False
                ties_off -= tied.numel()
                ties -= tied.numel()
            mask[chunk] &= above
    return keep


def nan_count(scores: Tensor) -> int:
    """Number of NaN values."""
    parts = torch.split(scores.reshape(-1), CHUNK)
    # the maximum is NaN when any element is, and much cheaper than isnan
    return sum(int(p.isnan().count_nonzero()) for p in parts if p.numel() and p.amax().isnan())


def _kth(layers: Sequence[Layer], k: int, wide: bool) -> tuple[int, int, int]:
    """The k-th smallest active key, how many of its equals are among the k, and their number."""
    bits = 64 if wide else 32
    prefix, remaining, in_bin = 0, k, 0
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(_BINS, dtype=torch.int64)
        for layer in layers:
            for chunk in _chunks(layer):
                scores = layer.scores[chunk]
                if layer.active is not None:
                    scores = scores[layer.active[chunk]]
                counts += _digit_counts(_keys(scores, wide), shift, prefix, bits)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, remaining))
        in_bin = int(counts[digit])
        remaining -= int(below[digit]) - in_bin
        # the top digit is signed: bin 0 holds the most negative keys
        prefix = digit - _BINS // 2 if shift == bits - _DIGIT_BITS else prefix * _BINS + digit
    return prefix, remaining, in_bin


def _digit_counts(keys: Tensor, shift: int, prefix: int, bits: int) -> Tensor:
    """Histogram of the digit at ``shift`` over the keys whose higher digits equal ``prefix``."""
    if shift == bits - _DIGIT_BITS:
        digits = (keys >> shift) + _BINS // 2
    else:
        keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
        digits = (keys >> shift) & (_BINS - 1)
    return torch.bincount(digits, minlength=_BINS).cpu()


def _chunks(layer: Layer) -> Iterator[slice]:
    for start in range(0, layer.scores.numel(), CHUNK):
        yield slice(start, start + CHUNK)


def _keys(scores: Tensor, wide: bool) -> Tensor:
    """Scores as int32 or int64 keys of the same order."""
    floating, integer = (_WIDE, torch.int64) if wide else (torch.float32, torch.int32)
    keys = scores.to(floating).view(integer)
    if keys.numel() and int(keys.amin()) < 0:
        # -0.0 joins 0.0; the bits of negative floats grow downwards, so all but the sign flip
        keys = torch.where(keys == torch.iinfo(integer).min, 0, keys)
        keys = torch.where(keys < 0, keys ^ torch.iinfo(integer).max, keys)
    return keys
