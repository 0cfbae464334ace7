"""Truth algebras: what the connectives mean on truth values.

Each algebra has a bounded lattice (``meet``, ``join``), two commutative monoids (``conjunction``
with unit ``top``, ``disjunction`` with unit ``bottom``), ``negate``, ``implies`` and, where it
exists, ``residuum``. Monoids and lattice coincide for Bool, LP and Godel; in Product and
Lukasiewicz they differ, and only the lattice is idempotent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, IntEnum
from functools import reduce
from typing import TYPE_CHECKING, Any

from sapwood import _check

if TYPE_CHECKING:
    from collections.abc import Iterable


class LPValue(IntEnum):
    """Truth values of the Logic of Paradox: false, both, true.

    Example:
        >>> from sapwood import nesy
        >>> nesy.LP.conjunction(nesy.LPValue.BOTH, nesy.LPValue.TRUE).designated
        True
    """

    FALSE = 0
    BOTH = 1
    TRUE = 2

    @property
    def designated(self) -> bool:
        """Whether a formula of this value holds: both and true do."""
        return self is not LPValue.FALSE


class Algebra(ABC):
    """A truth algebra; the instances are ``Bool``, ``LP``, ``Product``, ``Godel``, ``Lukasiewicz``.

    Example:
        >>> from sapwood import nesy
        >>> nesy.Lukasiewicz.conjunction(0.75, 0.5), nesy.Lukasiewicz.meet(0.75, 0.5)
        (0.25, 0.5)
    """

    bottom: Any
    top: Any

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def meet(self, x: Any, y: Any) -> Any:
        """The lattice's infimum."""
        return min(x, y)

    def join(self, x: Any, y: Any) -> Any:
        """The lattice's supremum."""
        return max(x, y)

    @abstractmethod
    def conjunction(self, x: Any, y: Any) -> Any:
        """The and-like monoid."""

    @abstractmethod
    def disjunction(self, x: Any, y: Any) -> Any:
        """The or-like monoid."""

    @abstractmethod
    def negate(self, x: Any) -> Any:
        """The negation; De Morgan holds."""

    def implies(self, x: Any, y: Any) -> Any:
        """Material implication, ``not x or y``."""
        return self.disjunction(self.negate(x), y)

    @abstractmethod
    def residuum(self, x: Any, y: Any) -> Any:
        """The largest z with ``conjunction(x, z) <= y``."""

    @abstractmethod
    def from_degree(self, degree: float) -> Any:
        """The truth value nearest in meaning to a degree in [0, 1]."""

    def forall(self, values: Iterable[Any]) -> Any:
        """The conjunction of finitely many values; ``top`` of none."""
        return reduce(self.conjunction, values, self.top)

    def exists(self, values: Iterable[Any]) -> Any:
        """The disjunction of finitely many values; ``bottom`` of none."""
        return reduce(self.disjunction, values, self.bottom)


def _checked_degree(degree: float) -> float:
    if not 0.0 <= degree <= 1.0:
        _check.fail(ValueError, "nesy", "degree", "lie in [0, 1]", degree)
    return degree


class _Boolean(Algebra):
    """Two truth values."""

    bottom, top = False, True

    def conjunction(self, x: Any, y: Any) -> Any:
        return x & y

    def disjunction(self, x: Any, y: Any) -> Any:
        return x | y

    def negate(self, x: Any) -> Any:
        return not x if isinstance(x, bool) else ~x

    def residuum(self, x: Any, y: Any) -> Any:
        return self.implies(x, y)

    def from_degree(self, degree: float) -> bool:
        return _checked_degree(degree) >= 0.5


class _Paradox(Algebra):
    """The Logic of Paradox: F < B < T with minimum and maximum; B and T count as true."""

    bottom, top = LPValue.FALSE, LPValue.TRUE

    def conjunction(self, x: Any, y: Any) -> Any:
        return min(x, y)

    def disjunction(self, x: Any, y: Any) -> Any:
        return max(x, y)

    def negate(self, x: Any) -> Any:
        return LPValue(2 - x)

    def residuum(self, x: Any, y: Any) -> Any:
        return LPValue.TRUE if x <= y else y

    def from_degree(self, degree: float) -> LPValue:
        """Thirds: false below 1/3, both up to 2/3, true above."""
        return LPValue(int(_checked_degree(degree) >= 1 / 3) + int(degree > 2 / 3))


class _Unit(Algebra):
    """Degrees in [0, 1], numbers or tensors; negation is 1 - x in all of them."""

    bottom, top = 0.0, 1.0

    def negate(self, x: Any) -> Any:
        return 1 - x

    def from_degree(self, degree: float) -> float:
        return _checked_degree(degree)

    def meet(self, x: Any, y: Any) -> Any:
        return _minimum(x, y)

    def join(self, x: Any, y: Any) -> Any:
        return _maximum(x, y)


class _Product(_Unit):
    """xy and x + y - xy: independent events."""

    def conjunction(self, x: Any, y: Any) -> Any:
        return x * y

    def disjunction(self, x: Any, y: Any) -> Any:
        return x + y - x * y

    def residuum(self, x: Any, y: Any) -> Any:
        return 1.0 if x == 0 else min(1.0, y / x)


class _Godel(_Unit):
    """Minimum and maximum of degrees."""

    def conjunction(self, x: Any, y: Any) -> Any:
        return _minimum(x, y)

    def disjunction(self, x: Any, y: Any) -> Any:
        return _maximum(x, y)

    def residuum(self, x: Any, y: Any) -> Any:
        return 1.0 if x <= y else y


class _Lukasiewicz(_Unit):
    """max(0, x + y - 1) and min(1, x + y)."""

    def conjunction(self, x: Any, y: Any) -> Any:
        return _maximum(0.0, x + y - 1)

    def disjunction(self, x: Any, y: Any) -> Any:
        return _minimum(1.0, x + y)

    def residuum(self, x: Any, y: Any) -> Any:
        return _minimum(1.0, 1 - x + y)


def _minimum(x: Any, y: Any) -> Any:
    if hasattr(x, "clamp") or hasattr(y, "clamp"):  # tensors with gradients
        return x.clamp(max=y) if hasattr(x, "clamp") else y.clamp(max=x)
    return min(x, y)


def _maximum(x: Any, y: Any) -> Any:
    if hasattr(x, "clamp") or hasattr(y, "clamp"):
        return x.clamp(min=y) if hasattr(x, "clamp") else y.clamp(min=x)
    return max(x, y)


Bool: Algebra = _Boolean("Bool")
LP: Algebra = _Paradox("LP")
Product: Algebra = _Product("Product")
Godel: Algebra = _Godel("Godel")
Lukasiewicz: Algebra = _Lukasiewicz("Lukasiewicz")


class Connective(str, Enum):
    """The connectives of formulas, by the algebra's method that interprets them."""

    AND = "conjunction"
    OR = "disjunction"
    NOT = "negate"
    IMPLIES = "implies"
    MEET = "meet"
    JOIN = "join"
