"""Reference semantics: a program in a monad, by enumeration of all its branches.

Nothing is traced or compiled. The generator is replayed with the values chosen so far, and every
step is a ``unit`` or a ``bind`` of the monad. Rows of a batch run one after the other. The cost is
that of all branches; everything else is tested against this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import giry_nodes
from sapwood.nesy.draws import (
    ChoiceLeaf,
    ContinuousLeaf,
    Guard,
    Leaf,
    Listed,
    NondetLeaf,
    checked_probabilities,
)
from sapwood.nesy.errors import UnsupportedMonadError
from sapwood.nesy.expressions import Constant, Expr, Observed, as_expr, evaluate, forcing
from sapwood.nesy.monads import Monad
from sapwood.nesy.running import Step, run

if TYPE_CHECKING:
    from sapwood.nesy.program import Program


class _Next(Exception):
    """The program needs a value that has not been chosen yet."""

    def __init__(self, leaf: Step) -> None:
        self.leaf = leaf


class _Failed(Exception):
    """A guard is false."""


class Rows:
    """Sizes of the batch, and the weights of leaves, computed once for all rows and replays."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.batch: int | None = None
        self._dtype = dtype
        self._weights: dict[tuple[Any, ...], list[Any]] = {}
        self._alive: list[Any] = []  # a freed tensor would lend its address to another

    def meet(self, tensor: Tensor, what: str) -> None:
        """Notes the batch size of a tensor.

        Raises:
            ValueError: when another tensor has another one.
        """
        size = tensor.shape[0]
        if self.batch is not None and size != self.batch:
            _check.fail(ValueError, "nesy", what, f"have batch size {self.batch}", size)
        self.batch = size

    def weights(self, leaf: Leaf) -> list[Any]:
        """Log weights as nested lists: rows if there are inputs, then the parent if any."""
        key = (leaf.source.key, *map(identity, leaf.inputs))
        if key not in self._weights:
            with torch.no_grad():
                found = leaf.source.log_weights(*leaf.inputs, dtype=self._dtype)
            self._weights[key] = found.double().tolist()
            self._alive.append(leaf)
        return self._weights[key]


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same numbers."""
    return (
        tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor._version
    )  # fmt: skip


class _Row:
    """Readings of one row; also decides what Python asks for."""

    def __init__(self, rows: Rows, row: int) -> None:
        self.rows = rows
        self.row = row

    def force(self, expression: Expr) -> Any:
        return self.plain(expression)

    def plain(self, value: Any) -> Any:
        """The value in this row."""
        expression = as_expr(value)
        self._meet(expression)
        return evaluate(expression, (), self.row)

    def _meet(self, expression: Expr) -> None:
        if isinstance(expression, Observed):
            self.rows.meet(expression.values, "observed values")
        for argument in getattr(expression, "arguments", ()):
            self._meet(argument)

    def leaf(self, leaf: Step, monad: Monad, nodes: int) -> Any:
        """A leaf as a value of the monad."""
        match leaf:
            case ChoiceLeaf():
                values = [self.plain(p) for p in leaf.probabilities]
                return monad.from_probabilities(leaf.support.values, checked_probabilities(values))
            case NondetLeaf():
                return monad.from_set(leaf.support.values)
            case ContinuousLeaf():
                if monad.name != "GiryQuadrature":
                    raise UnsupportedMonadError(
                        f"sapwood.nesy: a density must be read in a Giry monad, got {monad.name}"
                    )
                mean, deviation = self.plain(leaf.mean), self.plain(leaf.deviation)
                return monad.from_probabilities(*giry_nodes.normal(leaf, mean, deviation, nodes))
            case Leaf():
                return self._source(leaf, monad)
        raise TypeError(f"sapwood.nesy: {type(leaf).__name__} must be a draw")

    def _source(self, leaf: Leaf, monad: Monad) -> Any:
        if isinstance(leaf.source, Listed):
            return monad.from_probabilities(leaf.source.support.values, leaf.source.rows[0])
        for tensor in leaf.inputs:
            if leaf.batched:
                self.rows.meet(tensor, f"inputs of {leaf.source.name}")
        weights = self.rows.weights(leaf)
        depth = int(leaf.source.parent_support is not None) + 1
        if _depth(weights) > depth:
            weights = weights[self.row]
        if leaf.source.parent_support is not None:
            value = self.plain(leaf.parent)
            if value not in leaf.source.parent_support.index:
                _check.fail(
                    ValueError, f"nesy.{leaf.source.name}", "parent",
                    f"be one of {leaf.source.parent_support}", value,
                )  # fmt: skip
            weights = weights[leaf.source.parent_support.index[value]]
        return monad.from_logs(leaf.source.support.values, weights)


def _depth(nested: Any) -> int:
    return 1 + _depth(nested[0]) if isinstance(nested, list) else 0


def value(program: Program, monad: Monad, rows: Rows, row: int = 0, *, nodes: int = 64) -> Any:
    """What a program returns, as a value of the monad, in one row.

    Args:
        program: any program.
        monad: a monad with whatever the program does.
        rows: shared by all rows of the batch.
        row: which one.
        nodes: of Gauss-Hermite quadrature, per normal.

    Raises:
        UnsupportedMonadError: when the program does what the monad cannot.
    """
    reading = _Row(rows, row)

    def follow(chosen: Sequence[Any]) -> Any:
        try:
            result = _replay(program, reading, chosen)
        except _Next as reached:
            m = reading.leaf(reached.leaf, monad, nodes)
            return monad.bind(m, lambda a: follow((*chosen, a)))
        except _Failed:
            return monad.zero()
        return monad.unit(reading.plain(result))

    token = forcing.set(reading)
    try:
        return follow(())
    finally:
        forcing.reset(token)


def _replay(program: Program, reading: _Row, chosen: Sequence[Any]) -> Any:
    """Runs the program with the values chosen so far."""
    remaining = iter(chosen)

    def answer(step: Step) -> Any:
        if isinstance(step, Guard):
            if not reading.plain(step.condition):
                raise _Failed
            return Constant(None)
        for chosen_value in remaining:
            return Constant(chosen_value)
        raise _Next(step)

    return run(program, answer)


def batched(
    program: Program,
    monad: Monad,
    dtype: torch.dtype | None = None,
    *,
    batch: int | None = None,
    nodes: int = 64,
) -> tuple[list[Any], bool]:
    """The values of all rows, and whether the program has rows at all.

    Without ``batch`` the number of rows is that of the data which the first row reads.
    """
    rows = Rows(dtype)
    rows.batch = batch
    if batch == 0:
        return [], True
    first = value(program, monad, rows, 0, nodes=nodes)
    count = rows.batch
    others = range(1, 1 if count is None else count)
    rest = [value(program, monad, rows, r, nodes=nodes) for r in others]
    return [first, *rest], count is not None
