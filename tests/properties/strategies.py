"""Arguments of ops as hypothesis draws them: sizes, types, layouts, values; and how many.

Each property is shown 200 examples, the same in every run. ``PROPERTY_EXAMPLES=10000`` draws that
many instead, and others in every run but with the same ``--hypothesis-seed``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.check_op import OpBattery

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "expanded", "offset", "reordered")
# Around the widths of vectors, tiles and words of a bitmap.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


def example_settings(given: str | None) -> settings:
    """What every property runs with: ``given`` is the value of PROPERTY_EXAMPLES, if it is set."""
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"PROPERTY_EXAMPLES must be a positive number, got {given!r}")
    return settings(
        max_examples=200 if given is None else int(given),
        derandomize=given is None,
        database=None,
        print_blob=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


EXAMPLES = example_settings(os.environ.get("PROPERTY_EXAMPLES"))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The tensor under other strides; expanded, it repeats its first slice: other values.

    - transposed: the last two dimensions change places in memory;
    - sliced: every second element of every dimension of a larger tensor;
    - expanded: the first dimension has stride 0;
    - offset: one element after the beginning of its memory, and so not aligned;
    - reordered: the dimensions lie in reverse order in memory, for images channels last.
    """
    if layout == "expanded" and t.dim() and t.shape[0]:
        return t[:1].expand(t.shape)
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.zeros([2 * size + 1 for size in t.shape], dtype=t.dtype)
        found = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return found.copy_(t)
    if layout == "offset":
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    if layout == "reordered" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "reordered":
        backwards = list(range(t.dim()))[::-1]
        return t.permute(backwards).contiguous().permute(backwards)
    return t


class Source:
    """One example: everything random of it comes from here."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self.dtype: torch.dtype = draw(st.sampled_from(DTYPES))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def pick(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return self._draw(st.sampled_from(values))

    def flag(self) -> bool:
        return bool(self.pick((False, True)))

    def size(self, low: int = 0, high: int = SIZES[-1]) -> int:
        """A size within the bounds."""
        return int(self.pick([s for s in SIZES if low <= s <= high]))

    def sizes(self, *bounds: tuple[int, int], most: int) -> tuple[int, ...]:
        """Sizes within (low, high) each, whose product is ``most`` at most: references are slow.

        They are drawn in any order, so that each of them may be the large one.
        """
        found = [0] * len(bounds)
        left = most
        for i in torch.randperm(len(bounds), generator=self.generator).tolist():
            low, high = bounds[i]
            found[i] = self.size(low, max(low, min(high, left)))
            left //= max(1, found[i])
        return tuple(found)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of the example's type, in any layout."""
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return laid_out(t, self.pick(LAYOUTS))

    def mask(self, *shape: int) -> Tensor:
        """Bools of any density, none and all among them, in any layout."""
        density = self.pick((0.0, 0.1, 0.5, 0.9, 1.1))
        t = torch.rand(shape, generator=self.generator) < density
        return laid_out(t, self.pick(LAYOUTS))


Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Property:
    """An op, how its arguments are drawn, and what judges its results.

    ``battery`` compares with the float64 reference, within the bounds that it states; ``check``
    takes its place where a result is right or wrong only away from a threshold.
    """

    battery: type[OpBattery]
    arguments: Callable[[Source], Arguments]
    check: Callable[[Arguments], None] | None = None


@st.composite
def examples(draw: st.DrawFn, make: Callable[[Source], Arguments]) -> tuple[Arguments, torch.dtype]:
    """Arguments of one call, and the type of their floating tensors."""
    source = Source(draw)
    return make(source), source.dtype
