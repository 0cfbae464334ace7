"""What a program draws, and how plain distributions, data and guards enter it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy.expressions import Constant, Expr, Observed, Table, as_tuple
from sapwood.nesy.supports import Support, checked_support


class Source(Protocol):
    """What a leaf draws from; its weights depend on inputs and on at most one bound value."""

    name: str
    support: Support
    parent_support: Support | None
    normalised: bool

    @property
    def key(self) -> Hashable:
        """Equal keys mean equal weights."""

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, k) or, given a parent, (B, P, k); without B when there are no inputs."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """One draw: from what, given which inputs and which bound value."""

    source: Source
    inputs: tuple[Tensor, ...] = ()
    parent: Expr | None = None
    batched: bool = True  # False: the inputs have no rows


@dataclass(frozen=True, eq=False)
class ChoiceLeaf:
    """A draw from listed values; probabilities are numbers or depend on bound values."""

    support: Support
    probabilities: tuple[Any, ...]

    def as_leaf(self) -> Leaf:
        """The leaf, its parent the tuple of probabilities where one is an expression."""
        plain = [p.value if isinstance(p, Constant) else p for p in self.probabilities]
        if not any(isinstance(p, Expr) for p in plain):
            return Leaf(Listed(self.support, (checked_probabilities(plain),)))
        parent = as_tuple(plain)
        rows = tuple(checked_probabilities(row) for row in parent.support.values)
        return Leaf(Listed(self.support, rows, parent.support), (), parent)


@dataclass(frozen=True, eq=False)
class NondetLeaf:
    """A choice without probabilities; for Powerset."""

    support: Support


@dataclass(frozen=True, eq=False)
class ContinuousLeaf:
    """A draw from a density; for the Giry monads."""

    mean: Any = None  # of a normal distribution
    deviation: Any = None
    distribution: torch.distributions.Distribution | None = None


@dataclass(frozen=True, eq=False)
class Guard:
    """A condition without which there is no mass."""

    condition: Any


def checked_probabilities(values: Sequence[Any]) -> tuple[Any, ...]:
    """Numbers that are probabilities.

    Raises:
        ValueError: when one is negative, or they do not sum to 1.
    """
    total = sum(values)
    if not abs(total - 1) <= 1e-9 or any(v < 0 for v in values):
        shown = [float(v) for v in values]
        _check.fail(ValueError, "nesy.choice", "probabilities", "be >= 0 and sum to 1", shown)
    return tuple(values)


class Listed:
    """Numbers, one row per value of the parent."""

    name = "choice"
    normalised = True

    def __init__(
        self,
        support: Support,
        rows: tuple[tuple[Any, ...], ...],
        parent_support: Support | None = None,
    ) -> None:
        self.support = support
        self.rows = rows
        self.parent_support = parent_support

    @property
    def key(self) -> Hashable:
        return (self.support, self.rows, self.parent_support)

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        logs = [[math.log(p) if p > 0 else -math.inf for p in row] for row in self.rows]
        table = torch.tensor(logs, dtype=dtype)
        return table[0] if self.parent_support is None else table


def choice(probabilities: Mapping[Any, Any]) -> ChoiceLeaf:
    """Draws one of some values with given probabilities.

    Example:
        >>> from sapwood import nesy
        >>> light = nesy.choice({"red": 0.6, "yellow": 0.1, "green": 0.3})
        >>> nesy.fmap(lambda v: v == "green", light).truth(nesy.Dist)
        tensor(0.3000, dtype=torch.float64)

    Args:
        probabilities: of each value; numbers, ``Fraction`` included, or expressions of bound
            values. They sum to 1.

    Raises:
        ValueError: when they do not, or there is no value.
    """
    support = checked_support(probabilities)
    values = tuple(probabilities.values())
    if not any(hasattr(p, "_apply") for p in values):
        checked_probabilities(values)
    return ChoiceLeaf(support, values)


def uniform(values: Iterable[Any]) -> ChoiceLeaf:
    """Draws one of some values, all with the same probability.

    Example:
        >>> from sapwood import nesy
        >>> nesy.fmap(lambda v: v == 6, nesy.uniform(range(1, 7))).truth(nesy.Dist)
        tensor(0.1667, dtype=torch.float64)
    """
    support = checked_support(values)
    return ChoiceLeaf(support, (Fraction(1, len(support)),) * len(support))


def bernoulli(p: Any) -> ChoiceLeaf:
    """Draws True with probability p, a number or an expression of bound values.

    Example:
        >>> from sapwood import nesy
        >>> nesy.fmap(lambda v: v, nesy.bernoulli(0.25)).truth(nesy.Dist)
        tensor(0.2500, dtype=torch.float64)
    """
    return choice({True: p, False: 1 - p})


def nondet(values: Iterable[Any]) -> NondetLeaf:
    """One of some values, without probabilities; for the monad Powerset.

    Example:
        >>> from sapwood import nesy
        >>> nesy.fmap(lambda v: v > 1, nesy.nondet([1, 2])).truth(nesy.Powerset) == {True, False}
        True
    """
    return NondetLeaf(checked_support(values))


def normal(mu: Any, sigma: Any) -> ContinuousLeaf:
    """Draws a normal number; for the monads GirySampler and GiryQuadrature.

    Example:
        >>> from sapwood import nesy
        >>> positive = nesy.fmap(lambda t: t > 0, nesy.normal(0.0, 1.0))
        >>> abs(positive.truth(nesy.GirySampler, num_samples=10_000, seed=0).mean - 0.5) < 0.02
        True

    Args:
        mu: mean, a number or an expression of bound values.
        sigma: standard deviation, likewise.
    """
    return ContinuousLeaf(mu, sigma)


def continuous(distribution: torch.distributions.Distribution) -> ContinuousLeaf:
    """Draws from a scalar distribution of ``torch.distributions``; for the monad GirySampler.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> wait = nesy.continuous(torch.distributions.Exponential(torch.tensor(1.0)))
        >>> late = nesy.fmap(lambda t: t > 1, wait).truth(nesy.GirySampler, num_samples=10_000)
        >>> abs(late.mean - 0.3679) < 0.02
        True

    Raises:
        ValueError: for a distribution of more than one number.
    """
    if distribution.batch_shape + distribution.event_shape != ():
        shape = tuple(distribution.batch_shape + distribution.event_shape)
        _check.fail(ValueError, "nesy.continuous", "distribution", "be of one number", shape)
    return ContinuousLeaf(distribution=distribution)


def observed(values: Tensor, support: Iterable[Any] | None = None) -> Observed:
    """Data in a program: certain within a row, different between rows.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> nesy.zip_with(lambda d, n: d == n, nesy.uniform([1, 2]),
        ...               nesy.unit(nesy.observed(torch.tensor([2, 7])))).truth(nesy.Dist)
        tensor([0.5000, 0.0000], dtype=torch.float64)

    Args:
        values: (B, ...) integers, truth values or floats; slices keep the rows: ``n[:, 0]``.
        support: all values that can occur; others have no mass. Needed only to keep one plan where
            data are used otherwise than compared for equality; by default the values of the batch.

    Raises:
        TypeError: when ``values`` is no tensor.
        ValueError: when it has no batch dimension.
    """
    _check.tensor("nesy.observed", "values", values)
    if values.dim() == 0:
        _check.fail(ValueError, "nesy.observed", "values", "have shape (B, ...)", "shape ()")
    return Observed(values, None if support is None else checked_support(support))


def table(content: Sequence[Any] | Mapping[Any, Any]) -> Table:
    """A sequence or mapping that bound values may index without a branch.

    Example:
        >>> from sapwood import nesy
        >>> even = nesy.table([True, False, True])
        >>> nesy.fmap(lambda d: even[d], nesy.uniform([0, 1, 2])).truth(nesy.Dist)
        tensor(0.6667, dtype=torch.float64)
    """
    return Table(content)


def guard(condition: Any) -> Guard:
    """Yielded in a program: no mass where the condition is false.

    Example:
        >>> from sapwood import nesy
        >>> @nesy.do
        ... def six_given_even():
        ...     roll = yield nesy.uniform(range(1, 7))
        ...     yield nesy.guard(roll % 2 == 0)
        ...     return roll == 6
        >>> six_given_even().truth(nesy.Dist)
        tensor(0.3333, dtype=torch.float64)
    """
    return Guard(condition)
