"""Symbols: networks and tables whose value a program binds.

Calling a symbol makes a leaf, which says what to draw and evaluates nothing. The network
of a symbol is called once per truth, on the inputs of all its leaves together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood import _check
from sapwood.nesy.draws import Leaf, Source
from sapwood.nesy.expressions import as_expr
from sapwood.nesy.supports import Support, checked_support
from sapwood.ops.logsemiring import log_normalize

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

_TOLERANCE = 1e-6


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
        logits = self._checked(logits, middle, dtype)
        return F.log_softmax(logits, -1) if self.normalised else logits

    def _checked(
        self, logits: Tensor, middle: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        expected = (*middle, len(self.support))
        if tuple(logits.shape[1:]) != expected:
            shape = f"(B, {', '.join(map(str, expected))})"
            _check.fail(
                ValueError, f"nesy.{self.name}", "net's output", f"have shape {shape}",
                tuple(logits.shape),
            )  # fmt: skip
        return logits if dtype is None else logits.to(dtype)


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

    def logits(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, k) before the ``log_softmax``."""
        return self._checked(self.net(*inputs), (), dtype)


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
