"""Symbols: networks, tables and distributions whose value a program binds.

Calling a symbol makes a :class:`Leaf`, which says what to draw and evaluates nothing. The network
of a symbol is called once per truth, on the inputs of all its leaves together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood import _check
from sapwood.nesy.expressions import (
    Constant,
    Expr,
    Observed,
    Support,
    Table,
    as_expr,
    as_tuple,
    checked_support,
)
from sapwood.ops.logsemiring import log_normalize

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

_TOLERANCE = 1e-6


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
        support: values that can occur. Needed only to keep one plan where data are used otherwise
            than compared for equality; by default the values of the batch.

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


class _Neural(nn.Module):
    """A network over a support."""

    normalised = True
    parent_support: Support | None = None

    def __init__(self, net: nn.Module, support: Iterable[Any], name: str | None) -> None:
        super().__init__()
        self.net = net
        self.support = checked_support(support)
        self.name = name or type(self).__name__.lower()

    @property
    def key(self) -> Hashable:
        return self

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, k), normalised where the symbol is."""
        return self._finish(self.net(*inputs), (), dtype)

    def _finish(self, logits: Tensor, middle: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        expected = (*middle, len(self.support))
        if tuple(logits.shape[1:]) != expected:
            shape = f"(B, {', '.join(map(str, expected))})"
            _check.fail(
                ValueError, f"nesy.{self.name}", "net's output", f"have shape {shape}",
                tuple(logits.shape),
            )  # fmt: skip
        logits = logits if dtype is None else logits.to(dtype)
        return F.log_softmax(logits, -1) if self.normalised else logits


class Categorical(_Neural):
    """A network as an uncertain value: ``net(x)`` are the logits of its support.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> digit = nesy.Categorical(torch.nn.Linear(4, 10), support=range(10), name="digit")
        >>> nesy.fmap(lambda d: d < 5, digit(torch.zeros(3, 4))).log_truth().shape
        torch.Size([3])

    Args:
        net: inputs (B, ...) to logits (B, k); ``log_softmax`` is applied.
        support: the k values.
        name: for explanations and assignments.

    Raises:
        ValueError: for an empty support or one with a value twice.
    """

    def __init__(self, net: nn.Module, support: Iterable[Any], *, name: str | None = None) -> None:
        super().__init__(net, support, name)

    def forward(self, *inputs: Tensor) -> Leaf:
        """A leaf; the network runs when the truth is computed."""
        return Leaf(cast(Source, self), inputs)


class Conditional(_Neural):
    """An uncertain value that depends on a bound one: a log table, or a network.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> after = nesy.Conditional(torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), [0, 1], [0, 1])
        >>> @nesy.do
        ... def second_is_one():
        ...     first = yield nesy.uniform([0, 1])
        ...     second = yield after(first)
        ...     return second == 1
        >>> second_is_one().log_truth().exp()
        tensor(0.4500)

    Args:
        table_or_net: a (P, k) table of log probabilities (a ``Parameter`` is normalised at each
            use, so that it may be trained), or a network. A network is called once, with all
            inputs repeated for each of the P values of the parent and, last, the positions
            (B * P,) of these values; it returns (B * P, k) logits. Without inputs B is 1.
        support: the k values.
        parent_support: the P values that the bound value can take.
        name: for explanations and assignments.

    Raises:
        ValueError: for a table of another shape or whose rows are not normalised within 1e-6.
    """

    def __init__(
        self,
        table_or_net: Tensor | nn.Module,
        support: Iterable[Any],
        parent_support: Iterable[Any],
        *,
        name: str | None = None,
    ) -> None:
        net = table_or_net if isinstance(table_or_net, nn.Module) else nn.Identity()
        super().__init__(net, support, name)
        self.parent_support = checked_support(parent_support)
        self.table: Tensor | None = None
        if not isinstance(table_or_net, nn.Module):
            self._store(table_or_net)

    def _store(self, log_table: Tensor) -> None:
        assert self.parent_support is not None
        shape = (len(self.parent_support), len(self.support))
        _check.tensor(f"nesy.{self.name}", "table", log_table)
        _check.shape(f"nesy.{self.name}", "table", log_table, shape)
        masses = log_table.detach().double().logsumexp(-1)
        if self.normalised and not bool((masses.abs() <= _TOLERANCE).all()):
            worst = float(masses.abs().max())
            _check.fail(
                ValueError, f"nesy.{self.name}", "table", "have rows of mass 1 (log 0)", worst
            )
        del self.table
        if isinstance(log_table, nn.Parameter):
            self.table = log_table
        else:
            self.register_buffer("table", log_table)

    def forward(self, parent: Any, *inputs: Tensor) -> Leaf:
        """A leaf given a bound value and, for a network, its inputs."""
        return Leaf(cast(Source, self), inputs, as_expr(parent))

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(P, k) without inputs, else (B, P, k)."""
        if self.table is not None:
            learned = self.normalised and isinstance(self.table, nn.Parameter)
            found = self.table if dtype is None else self.table.to(dtype)
            return log_normalize(found, -1) if learned else found
        assert self.parent_support is not None
        count = len(self.parent_support)
        batch = inputs[0].shape[0] if inputs else 1
        device = inputs[0].device if inputs else next(self.net.parameters()).device
        positions = torch.arange(count, device=device).repeat(batch)
        logits = self.net(*(x.repeat_interleave(count, 0) for x in inputs), positions)
        if logits.shape != (batch * count, len(self.support)):
            shape = (batch * count, len(self.support))
            _check.fail(
                ValueError, f"nesy.{self.name}", "net's output", f"have shape {shape}",
                tuple(logits.shape),
            )  # fmt: skip
        weights = self._finish(logits.view(batch, count, -1), (count,), dtype)
        return weights if inputs else weights[0]


class Weighted(Conditional):
    """Unnormalised masses; the truth is relative to the total mass of all draws.

    Below a bound value its masses would change the distribution of that value, which is a
    :class:`TiltError` unless ``allow_tilt``: so does leaving out the normalisation of a head.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> w = nesy.Weighted(torch.tensor([1.0, 3.0]).log(), [0, 1])
        >>> nesy.fmap(lambda v: v == 1, w()).log_truth().exp()
        tensor(0.7500)

    Args:
        table_or_net: log masses: a table (k,), or (P, k) with ``parent_support``, or a network as
            for :class:`Categorical` and :class:`Conditional`.
        support: the k values.
        parent_support: the P values of the bound value it depends on, if any.
        allow_tilt: accept that the masses count as evidence about earlier draws.
        name: for explanations and assignments.
    """

    normalised = False

    def __init__(
        self,
        table_or_net: Tensor | nn.Module,
        support: Iterable[Any],
        parent_support: Iterable[Any] | None = None,
        *,
        allow_tilt: bool = False,
        name: str | None = None,
    ) -> None:
        self._has_parent = parent_support is not None
        given: Tensor | nn.Module = table_or_net
        if isinstance(given, Tensor) and not self._has_parent:
            given = given.unsqueeze(0)
        super().__init__(given, support, parent_support or (None,), name=name)
        self.allow_tilt = allow_tilt
        if not self._has_parent:
            self.parent_support = None

    def forward(self, *arguments: Any) -> Leaf:
        """A leaf given the bound value, if there is one, and the inputs."""
        if self._has_parent:
            return super().forward(*arguments)
        return Leaf(cast(Source, self), arguments)

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, k), (B, P, k), (P, k) or (k,)."""
        if self._has_parent:
            return super().log_weights(*inputs, dtype=dtype)
        if self.table is not None:
            return self.table[0] if dtype is None else self.table[0].to(dtype)
        return self._finish(self.net(*inputs), (), dtype)


class TwoSided(_Neural):
    """A network from one distribution to another: its argument is a program.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> noisy = nesy.TwoSided(torch.nn.Linear(2, 3), support=["a", "b", "c"])
        >>> leaf = noisy(nesy.fmap(lambda v: v, nesy.uniform([0, 1])))
        >>> nesy.fmap(lambda v: v == "a", leaf).log_truth().shape
        torch.Size([])

    Args:
        net: log probabilities (B, j) of the argument's values, in their order, to logits (B, k).
        support: the k values.
        name: for explanations and assignments.
    """

    def __init__(self, net: nn.Module, support: Iterable[Any], *, name: str | None = None) -> None:
        super().__init__(net, support, name)

    def forward(self, argument: Program) -> Leaf:
        """A leaf from the distribution of a program, which must not use values bound outside."""
        log_probs = argument.distribution().log_prob
        return Leaf(cast(Source, self), (log_probs,), batched=log_probs.dim() > 1)

    def log_weights(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, k), or (k,) for an argument without rows."""
        (log_probs,) = inputs
        if log_probs.dim() == 1:
            return super().log_weights(log_probs[None], dtype=dtype)[0]
        return super().log_weights(log_probs, dtype=dtype)
