"""The monads: kinds of uncertainty with ``unit`` and ``bind``.

Finite monads hold a weight per value, in a semiring. Powerset is the one over truth values, Tens
over the non-negative reals, LogTens over their logarithms, MaxPlus keeps the best weight; Dist is
the mass-one part of Tens. Probabilities with p + q - pq as a sum are no semiring, so Dist is not
one of those. All of them are commutative: independent binds may change places.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np

from sapwood.nesy.errors import UnsupportedMonadError


class Monad(ABC):
    """``unit`` makes a certain value, ``bind`` continues an uncertain one."""

    name: str

    def __repr__(self) -> str:
        return self.name

    @abstractmethod
    def unit(self, value: Any) -> Any:
        """The value for certain."""

    @abstractmethod
    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        """Continues with ``k`` from every value of ``m``."""

    @abstractmethod
    def holds(self, value: object) -> bool:
        """Whether ``value`` is one of this monad, and no plain value."""

    def zero(self) -> Any:
        """What remains after a failed guard.

        Raises:
            UnsupportedMonadError: where the monad has no such value.
        """
        self._lacks("a guard")

    def from_probabilities(self, values: Sequence[Any], weights: Sequence[Any]) -> Any:
        """The uncertain value with these probabilities or masses.

        Raises:
            UnsupportedMonadError: where the monad has no distributions.
        """
        self._lacks("a distribution")

    def from_logs(self, values: Sequence[Any], logs: Sequence[float]) -> Any:
        """The same from logarithms."""
        return self.from_probabilities(values, [math.exp(w) for w in logs])

    def from_set(self, values: Sequence[Any]) -> Any:
        """The nondeterministic choice of one of the values."""
        self._lacks("a nondeterministic choice")

    def _lacks(self, what: str) -> NoReturn:
        raise UnsupportedMonadError(f"sapwood.nesy: {self.name} must have {what}, it has none")


@dataclass(frozen=True)
class Semiring:
    """Sums and products of weights."""

    zero: Any
    one: Any
    add: Callable[[Any, Any], Any]
    multiply: Callable[[Any, Any], Any]


def _log_add(a: float, b: float) -> float:
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


BOOLEAN = Semiring(False, True, lambda a, b: a or b, lambda a, b: a and b)
REAL = Semiring(0.0, 1.0, lambda a, b: a + b, lambda a, b: a * b)
RATIONAL = Semiring(Fraction(0), Fraction(1), REAL.add, REAL.multiply)
LOG = Semiring(-math.inf, 0.0, _log_add, lambda a, b: a + b)
MAX_PLUS = Semiring(-math.inf, 0.0, max, LOG.multiply)


class Weights(Mapping[Any, Any]):
    """A finite map from values to weights that are not zero."""

    def __init__(self, weights: Mapping[Any, Any]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, value: Any) -> Any:
        return self._weights[value]

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"Weights({self._weights})"


class FiniteMonad(Monad):
    """Weights in a semiring; ``number`` makes a weight from a probability.

    Example:
        >>> from sapwood import nesy
        >>> coin = nesy.Tens.from_probabilities([0, 1], [0.5, 0.5])
        >>> nesy.Tens.bind(coin, lambda a: nesy.Tens.unit(a * 10))
        Weights({0: 0.5, 10: 0.5})
    """

    def __init__(
        self, name: str, semiring: Semiring, number: Callable[[Any], Any], *, guards: bool = True
    ) -> None:
        self.name = name
        self.semiring = semiring
        self.number = number
        self.guards = guards

    def __call__(self, *, number: type) -> FiniteMonad:
        """The same monad over ``float`` or, for exact results, ``fractions.Fraction``.

        Raises:
            UnsupportedMonadError: for a monad without probabilities.
            ValueError: for another type of numbers.
        """
        if self.semiring not in (REAL, RATIONAL):
            self._lacks("a choice of numbers")
        if number not in (float, Fraction):
            raise ValueError(
                f"sapwood.nesy.{self.name}: number must be float or Fraction, got {number}"
            )
        semiring = RATIONAL if number is Fraction else REAL
        return FiniteMonad(self.name, semiring, number, guards=self.guards)

    def unit(self, value: Any) -> Weights:
        return Weights({value: self.semiring.one})

    def bind(self, m: Weights, k: Callable[[Any], Weights]) -> Weights:
        s, result = self.semiring, dict[Any, Any]()
        for a, weight in m.items():
            for b, following in k(a).items():
                term = s.multiply(weight, following)
                result[b] = s.add(result[b], term) if b in result else term
        return Weights({b: w for b, w in result.items() if w != s.zero})

    def holds(self, value: object) -> bool:
        return isinstance(value, Weights)

    def zero(self) -> Weights:
        if not self.guards:
            self._lacks("a guard")
        return Weights({})

    def from_probabilities(self, values: Sequence[Any], weights: Sequence[Any]) -> Weights:
        return self._collect(values, [self.number(w) for w in weights])

    def from_logs(self, values: Sequence[Any], logs: Sequence[float]) -> Weights:
        if self.semiring in (LOG, MAX_PLUS):
            return self._collect(values, logs)
        return self.from_probabilities(values, [math.exp(w) for w in logs])

    def from_set(self, values: Sequence[Any]) -> Weights:
        if self.semiring is not BOOLEAN:
            self._lacks("a nondeterministic choice")
        return self._collect(values, [True] * len(values))

    def mass(self, m: Weights) -> Any:
        """The sum of all weights."""
        total = self.semiring.zero
        for weight in m.values():
            total = self.semiring.add(total, weight)
        return total

    def _collect(self, values: Iterable[Any], weights: Iterable[Any]) -> Weights:
        pairs = zip(values, weights, strict=True)
        return Weights({v: w for v, w in pairs if w != self.semiring.zero})


def _log(probability: Any) -> float:
    return math.log(probability) if probability > 0 else -math.inf


class IdentityMonad(Monad):
    """Plain values: no uncertainty at all."""

    name = "Identity"

    def unit(self, value: Any) -> Any:
        return value

    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        return k(m)

    def holds(self, value: object) -> bool:
        return False


class Batch(Monad):
    """Rows side by side: functions from a row to a value of another monad.

    Taking one row is a morphism of monads, so a batched run equals the single runs.

    Example:
        >>> from sapwood import nesy
        >>> rows = nesy.Batch(nesy.Identity)
        >>> doubled = rows.bind(lambda row: row + 1, lambda a: lambda row: 2 * a)
        >>> doubled(0), doubled(4)
        (2, 10)

    Args:
        monad: that of every row.
    """

    def __init__(self, monad: Monad) -> None:
        self.monad = monad
        self.name = f"Batch({monad.name})"

    def unit(self, value: Any) -> Callable[[int], Any]:
        return lambda row: self.monad.unit(value)

    def bind(
        self, m: Callable[[int], Any], k: Callable[[Any], Callable[[int], Any]]
    ) -> Callable[[int], Any]:
        return lambda row: self.monad.bind(m(row), lambda a: k(a)(row))

    def holds(self, value: object) -> bool:
        return callable(value)

    def zero(self) -> Callable[[int], Any]:
        empty = self.monad.zero()
        return lambda row: empty


class SamplerMonad(Monad):
    """Random values: functions from a random generator to one draw.

    Programs draw many values at once (:mod:`sapwood.nesy.giry`); the laws are about one.
    """

    name = "GirySampler"

    def unit(self, value: Any) -> Callable[[np.random.Generator], Any]:
        return lambda rng: value

    def bind(self, m: Callable[[Any], Any], k: Callable[[Any], Callable[[Any], Any]]) -> Any:
        return lambda rng: k(m(rng))(rng)

    def holds(self, value: object) -> bool:
        return callable(value)

    def from_probabilities(self, values: Sequence[Any], weights: Sequence[Any]) -> Any:
        bounds = np.cumsum([float(w) for w in weights])
        last = len(values) - 1
        return lambda rng: values[
            min(int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right")), last)
        ]


Identity = IdentityMonad()
Powerset = FiniteMonad("Powerset", BOOLEAN, lambda p: p > 0)
Dist = FiniteMonad("Dist", REAL, float, guards=False)
Tens = FiniteMonad("Tens", REAL, float)
LogTens = FiniteMonad("LogTens", LOG, _log)
MaxPlus = FiniteMonad("MaxPlus", MAX_PLUS, _log)
GirySampler = SamplerMonad()
GiryQuadrature = FiniteMonad("GiryQuadrature", REAL, float)
