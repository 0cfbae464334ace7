"""The sampling reading: all draws of a program at once, as arrays.

Where Python asks for a value, the draws are divided by it and each group goes on alone, with what
it had drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood import _check
from sapwood.nesy.draws import ChoiceLeaf, ContinuousLeaf, Guard, Leaf
from sapwood.nesy.errors import UnsupportedMonadError
from sapwood.nesy.expressions import TRUTH, Constant, Expr, Observed, as_expr, evaluate, forcing
from sapwood.nesy.oracle import Rows
from sapwood.nesy.running import Step, run
from sapwood.nesy.supports import Function, Support

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A probability from draws, with its standard error; floats, or (B,) with data."""

    mean: Any
    stderr: Any


class Draws(Expr):
    """One value per draw."""

    __slots__ = ("values",)

    def __init__(self, values: Array) -> None:
        self.values = values

    def compute(self, function: Function, arguments: Sequence[Expr]) -> Expr:
        """Applies a function to the draws of the present group."""
        run = forcing.get()
        assert isinstance(run, _Group)
        arrays = [run.read(a) for a in arguments]
        if function is TRUTH:
            return Draws(arrays[0].astype(bool))
        if isinstance(function.key, str) and function.name != "[]":
            return Draws(np.asarray(function.call(*arrays)))
        columns = [_codes(a) for a in np.broadcast_arrays(*arrays)]
        return Draws(_by_combination(function, columns))


def _codes(array: Array) -> tuple[list[Any], Array]:
    """Distinct values, and the number of each entry's."""
    if array.dtype != object:
        distinct, codes = np.unique(array, return_inverse=True)
        return distinct.tolist(), codes
    numbers: dict[Any, int] = {}
    codes = np.fromiter((numbers.setdefault(v, len(numbers)) for v in array), np.int64, len(array))
    return list(numbers), codes


def _by_combination(function: Function, columns: list[tuple[list[Any], Array]]) -> Array:
    """A function without an array form, called once per combination of values that occurs."""
    flat = np.zeros(len(columns[0][1]), dtype=np.int64)
    for values, codes in columns:
        flat = flat * len(values) + codes
    distinct, back = np.unique(flat, return_inverse=True)
    results = []
    for code in distinct.tolist():
        arguments = []
        for values, _ in reversed(columns):
            code, place = divmod(code, len(values))
            arguments.append(values[place])
        results.append(function.call(*reversed(arguments)))
    return _as_array(results)[back]


def _as_array(values: Sequence[Any]) -> Array:
    """Numbers and truth values as such, everything else as objects."""
    if all(isinstance(v, bool | np.bool_) for v in values):
        return np.array(values, dtype=bool)
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return np.array(values)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


class _Split(Exception):
    """The draws of a group differ in a value that Python asks for."""

    def __init__(self, values: Array) -> None:
        self.values = values


class _Group:
    """Draws that have gone the same way so far."""

    def __init__(
        self, sampler: _Sampler, count: int, drawn: list[Array], decided: list[Any]
    ) -> None:
        self.count = count
        self.drawn = drawn
        self.decided = decided
        self.alive = np.ones(count, dtype=bool)
        self._sampler = sampler
        self._binds = 0
        self._forced = 0

    def read(self, value: Any) -> Array:
        """(count,) or (1,) values of an expression in this row."""
        expression = as_expr(value)
        if isinstance(expression, Draws):
            return expression.values
        if isinstance(expression, Observed):
            self._sampler.rows.meet(expression.values, "observed values")
        plain = evaluate(expression, (), self._sampler.row)
        return _as_array([plain])

    def force(self, expression: Expr) -> Any:
        if not isinstance(expression, Draws):
            return self.read(expression)[0]
        if self._forced == len(self.decided):
            values = np.broadcast_to(expression.values, (self.count,))
            if self.count and not bool((values == values[0]).all()):
                raise _Split(values)
            self.decided.append(values[0].item() if values.dtype != object else values[0])
        self._forced += 1
        return self.decided[self._forced - 1]

    def answer(self, step: Step) -> Any:
        if isinstance(step, Guard):
            self.alive &= np.broadcast_to(self.read(step.condition).astype(bool), (self.count,))
            return Constant(None)
        if self._binds == len(self.drawn):
            self.drawn.append(self._draw(step))
        self._binds += 1
        return Draws(self.drawn[self._binds - 1])

    def _draw(self, step: Step) -> Array:
        rng = self._sampler.rng
        match step:
            case ContinuousLeaf(distribution=None):
                mean, deviation = self.read(step.mean), self.read(step.deviation)
                return np.asarray(rng.normal(mean, deviation, self.count))
            case ContinuousLeaf(distribution=distribution):
                assert distribution is not None
                return self._from_torch(distribution)
            case ChoiceLeaf(support, probabilities):
                columns = [self.read(p).astype(float) for p in probabilities]
                return self._pick(support, np.stack(np.broadcast_arrays(*columns), -1))
            case Leaf():
                return self._from_source(step)
        raise UnsupportedMonadError(
            "sapwood.nesy: GirySampler must have probabilities, a nondeterministic choice has none"
        )

    def _from_torch(self, distribution: torch.distributions.Distribution) -> Array:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self._sampler.rng.integers(2**62)))
            return distribution.sample((self.count,)).double().numpy()

    def _from_source(self, leaf: Leaf) -> Array:
        source, sampler = leaf.source, self._sampler
        for tensor in leaf.inputs if leaf.batched else ():
            sampler.rows.meet(tensor, f"inputs of {source.name}")
        weights = np.array(sampler.rows.weights(leaf))
        if weights.ndim > 1 + (source.parent_support is not None):
            weights = weights[sampler.row]
        if source.parent_support is not None:
            values, codes = _codes(np.broadcast_to(self.read(leaf.parent), (self.count,)))
            weights = weights[[source.parent_support.index[v] for v in values]][codes]
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        return self._pick(source.support, weights / weights.sum(-1, keepdims=True))

    def _pick(self, support: Support, probabilities: Array) -> Array:
        """Draws by inversion; probabilities (k,) or (1 or count, k)."""
        bounds = np.cumsum(np.atleast_2d(probabilities), -1)[:, :-1]
        uniform = self._sampler.rng.random(self.count)
        places = np.zeros(self.count, dtype=np.int64)
        for column in bounds.T:
            places += uniform >= column
        return _as_array(support.values)[places]


class _Sampler:
    """Draws of one row of a program."""

    def __init__(self, rng: np.random.Generator, rows: Rows, row: int) -> None:
        self.rng = rng
        self.rows = rows
        self.row = row

    def counts(self, program: Program, count: int) -> tuple[int, int]:
        """How many draws are true, of how many for which the guards hold."""
        pending = [_Group(self, count, [], [])]
        true = alive = 0
        while pending:
            group = pending.pop()
            token = forcing.set(group)
            try:
                result = np.broadcast_to(group.read(run(program, group.answer)), (group.count,))
                true += int((result.astype(bool) & group.alive).sum())
                alive += int(group.alive.sum())
            except _Split as split:
                pending += self._divided(group, split.values)
            finally:
                forcing.reset(token)
        return true, alive

    def _divided(self, group: _Group, values: Array) -> list[_Group]:
        distinct, codes = _codes(values)
        parts = []
        for code, value in enumerate(distinct):
            own = codes == code
            drawn = [d[own] for d in group.drawn]
            parts.append(_Group(self, int(own.sum()), drawn, [*group.decided, value]))
        return parts


def estimate(program: Program, num_samples: int = 100_000, seed: int | None = None) -> Estimate:
    """The share of draws in which the sentence is true, of those for which the guards hold.

    Args:
        program: any program that returns a truth value.
        num_samples: draws per row.
        seed: of the randomness; None for a different one each time.

    Returns:
        Mean and standard error; NaN in a row where no draw passed the guards.
    """
    if num_samples < 1:
        _check.fail(ValueError, "nesy.GirySampler", "num_samples", "be at least 1", num_samples)
    rng = np.random.default_rng(seed)
    rows = Rows(program.dtype)
    found = [_Sampler(rng, rows, 0).counts(program, num_samples)]
    for row in range(1, 1 if rows.batch is None else rows.batch):
        found.append(_Sampler(rng, rows, row).counts(program, num_samples))
    means = [true / alive if alive else math.nan for true, alive in found]
    errors = [
        math.sqrt(m * (1 - m) / alive) if alive else math.nan
        for m, (_, alive) in zip(means, found, strict=True)
    ]
    if rows.batch is None:
        return Estimate(means[0], errors[0])
    return Estimate(_tensor(means), _tensor(errors))


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
