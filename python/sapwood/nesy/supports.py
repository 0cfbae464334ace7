"""Supports, the values that expressions can take, and functions as tables over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood import _check
from sapwood.nesy.errors import TraceError

Indices = NDArray[np.int64]


class Support:
    """Distinct values in a fixed order; equal supports are the same object."""

    _known: ClassVar[WeakValueDictionary[tuple[Hashable, ...], Support]] = WeakValueDictionary()

    values: tuple[Any, ...]
    index: dict[Any, int]
    #: The first value when the values are consecutive integers, else None.
    first_integer: int | None

    def __new__(cls, values: Iterable[Any]) -> Support:
        fixed = tuple(values)
        key = (tuple(map(type, fixed)), fixed)
        found = cls._known.get(key)
        if found is None:
            found = super().__new__(cls)
            found.values = fixed
            found.index = {value: i for i, value in enumerate(fixed)}
            found.first_integer = _first_integer(fixed)
            if len(found.index) != len(fixed):
                raise ValueError(f"sapwood.nesy: support must have distinct values, got {fixed}")
            cls._known[key] = found
        return found

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        if len(self) > 6 and self.first_integer is not None:
            return f"{{{self.values[0]}..{self.values[-1]}}}"
        return "{" + ", ".join(map(str, self.values)) + "}"

    @property
    def boolean(self) -> bool:
        """Whether all values are truth values."""
        return all(isinstance(v, bool | np.bool_) for v in self.values)


def _first_integer(values: tuple[Any, ...]) -> int | None:
    if not values or not all(type(v) is int for v in values):
        return None
    consecutive = all(v == values[0] + i for i, v in enumerate(values))
    return int(values[0]) if consecutive else None


class Places:
    """Where values of data lie in a support, counted from 1, as a tensor computation."""

    _known: ClassVar[dict[Support, Places]] = {}

    def __init__(self, support: Support) -> None:
        self.first = support.first_integer
        self.count = len(support)
        numbers = [
            (float(v), i) for i, v in enumerate(support.values) if isinstance(v, int | float)
        ]
        numbers.sort()
        self._values = torch.tensor([v for v, _ in numbers], dtype=torch.float64)
        self._places = torch.tensor([i for _, i in numbers], dtype=torch.int64)

    @classmethod
    def of(cls, support: Support) -> Places:
        """The table of a support; the ones used are kept."""
        found = cls._known.get(support)
        if found is None:
            if len(cls._known) >= 4096:
                cls._known.clear()
            found = cls._known[support] = cls(support)
        return found

    def __call__(self, values: Tensor) -> Tensor:
        """(...) values to int64 places; 0 or one more than there are values for unknown ones."""
        if self.first is not None and not values.is_floating_point():
            shifted = values.long() - (self.first - 1) if self.first != 1 else values.long()
            return shifted.clamp(0, self.count + 1)
        if len(self._values) == 0:
            return torch.zeros_like(values, dtype=torch.int64)
        wide = values.double()
        known = self._values.to(values.device)
        near = torch.searchsorted(known, wide).clamp(max=len(known) - 1)
        places = self._places.to(values.device)[near]
        return torch.where(known[near] == wide, places + 1, 0)


def checked_support(values: Iterable[Any]) -> Support:
    """A support from a user's values.

    Raises:
        ValueError: when it is empty, or has a value twice.
        TypeError: for a value that has no hash.
    """
    support = Support(values)
    if len(support) == 0:
        _check.fail(ValueError, "nesy", "support", "have at least one value", "none")
    return support


@dataclass(frozen=True)
class Function:
    """A function of expressions; equal keys mean equal functions.

    The key of a function with fixed arguments is that of the whole function, its number of
    arguments, and the place, type and value of each constant.
    """

    name: str
    call: Callable[..., Any] = field(compare=False)
    key: Hashable = None

    def fixed(self, constants: dict[int, Any], count: int) -> Function:
        """The function of the remaining arguments, with constants at the given places."""
        free = [i for i in range(count) if i not in constants]

        def call(*arguments: Any) -> Any:
            places: list[Any] = [constants.get(i) for i in range(count)]
            for i, argument in zip(free, arguments, strict=True):
                places[i] = argument
            return self.call(*places)

        typed = tuple((i, type(v), v) for i, v in constants.items())
        return Function(self.name, call, (self.key, count, typed))


@lru_cache(maxsize=4096)
def tabulate(function: Function, supports: tuple[Support, ...]) -> tuple[Support, Indices]:
    """The values of a function over all combinations, and which of them each one gives."""
    numbers: dict[Any, int] = {}
    table = np.empty([len(s) for s in supports], dtype=np.int64)
    for place, arguments in enumerate(itertools.product(*(s.values for s in supports))):
        try:
            value = function.call(*arguments)
        except Exception as error:
            shown = ", ".join(map(repr, arguments))
            raise TraceError(
                f"sapwood.nesy: {function.name} must be defined on all values of its arguments, "
                f"got {error!r} for ({shown})"
            ) from error
        table.flat[place] = numbers.setdefault(value, len(numbers))
    order, values = _sorted(list(numbers))
    return Support(values), order[table]


def _sorted(values: list[Any]) -> tuple[Indices, list[Any]]:
    """Values in ascending order where they have one, and the new place of each."""
    try:
        ranks = sorted(range(len(values)), key=values.__getitem__)
    except TypeError:
        ranks = list(range(len(values)))
    places = np.empty(len(values), dtype=np.int64)
    places[ranks] = np.arange(len(values))
    return places, [values[r] for r in ranks]
