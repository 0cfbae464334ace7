"""Runs a program on symbols: each way that Python can go through it is a path.

A bound value is a variable with a support. Where Python asks for a value (``if``, ``and``, ``in``,
``int``, an index) the run splits: each value that is still possible becomes a decision, and the
program is replayed for it. Paths exclude each other, so their masses add up.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from sapwood import _check
from sapwood.nesy.draws import ChoiceLeaf, ContinuousLeaf, Guard, Leaf, NondetLeaf
from sapwood.nesy.errors import TiltError, TraceError, UnsupportedMonadError
from sapwood.nesy.expressions import (
    AND,
    EQUAL,
    Apply,
    Constant,
    Expr,
    Observed,
    Variable,
    apply,
    as_expr,
    evaluate,
    forcing,
    is_boolean,
    roots,
)
from sapwood.nesy.oracle import identity
from sapwood.nesy.running import Step, run
from sapwood.nesy.symbols import Weighted

if TYPE_CHECKING:
    from sapwood.nesy.program import Program


class _Dead(Exception):
    """A guard is false on this path, whatever the draws."""


@dataclass
class Path:
    """One way through the program."""

    leaves: list[Leaf] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    decisions: list[Expr] = field(default_factory=list)  # all true on this path
    guards: list[Expr] = field(default_factory=list)
    result: Expr = field(default_factory=lambda: Constant(None))


@dataclass
class Trace:
    """All paths of a program, and the data that they read."""

    paths: list[Path]
    batch: int | None
    weighted: bool  # some masses are not normalised
    runs: int = 0  # of the generator


class _Tracer:
    """One run of the generator, given what earlier runs decided."""

    def __init__(self, decided: list[Any]) -> None:
        self.decided = decided
        self.alternatives: list[list[Any]] = []
        self.path = Path()
        self.batch: int | None = None
        self.weighted = False
        self._possible: dict[Variable, np.ndarray[Any, Any]] = {}
        self._forced = 0
        self._counts: dict[str, int] = {}

    def answer(self, step: Step) -> Any:
        match step:
            case Guard(condition):
                return self._guard(as_expr(condition))
            case NondetLeaf() | ContinuousLeaf():
                what = "a nondeterministic choice" if isinstance(step, NondetLeaf) else "a density"
                raise UnsupportedMonadError(
                    f"sapwood.nesy: a compiled program must draw from finite distributions, "
                    f"got {what}"
                )
            case ChoiceLeaf():
                return self._bind(step.as_leaf())
            case Leaf():
                return self._bind(step)

    def _guard(self, condition: Expr) -> Constant:
        self._see(condition)
        if isinstance(condition, Constant):
            if not condition.value:
                raise _Dead
        else:
            self.path.guards.append(condition)
            self._narrow(condition, True)
        return Constant(None)

    def _bind(self, leaf: Leaf) -> Variable:
        for tensor in leaf.inputs:
            if leaf.batched:
                self._meet(tensor, f"inputs of {leaf.source.name}")
        if not leaf.source.normalised:
            self._check_tilt(leaf)
            self.weighted = True
        if leaf.parent is not None:
            _check_parent(leaf)
        variable = Variable(len(self.path.variables), leaf.source.support)
        number = self._counts.get(leaf.source.name, 0)
        self._counts[leaf.source.name] = number + 1
        self.path.names.append(f"{leaf.source.name}[{number}]")
        self.path.variables.append(variable)
        self.path.leaves.append(replace(leaf))  # one leaf may be drawn from several times
        return variable

    def _check_tilt(self, leaf: Leaf) -> None:
        bound = self.path.decisions or (leaf.parent is not None and roots(leaf.parent))
        source = leaf.source
        if bound and not (isinstance(source, Weighted) and source.allow_tilt):
            raise TiltError(
                f"sapwood.nesy.{source.name}: masses below a bound value must be normalised "
                "(or allow_tilt=True): they would change that value's distribution"
            )

    def force(self, expression: Expr) -> Any:
        """Decides a value that Python asks for."""
        self._see(expression)
        if expression.reads_data:
            raise TraceError(
                f"sapwood.nesy: a branch must not depend on observed data{_user_line()}: "
                "its value differs between rows"
            )
        values = self._remaining(expression)
        if self._forced < len(self.decided):
            value = self.decided[self._forced]
        else:
            if not values:
                raise _Dead
            value, *others = values
            self.alternatives += [[*self.decided, other] for other in others]
            self.decided = [*self.decided, value]
        self._forced += 1
        self.path.decisions.append(apply(EQUAL, expression, value))
        self._narrow(expression, value)
        return value

    def _remaining(self, expression: Expr) -> list[Any]:
        """Values that the decisions so far leave possible, as far as one variable tells."""
        depends = roots(expression)
        if len(depends) != 1:
            return list(expression.support.values)
        (variable,) = depends
        allowed = self._possible.get(variable)
        values = _values_by_root(expression, variable)
        found = dict.fromkeys(v for i, v in enumerate(values) if allowed is None or allowed[i])
        return [v for v in expression.support.values if v in found]

    def _narrow(self, expression: Expr, value: Any) -> None:
        depends = roots(expression)
        if len(depends) != 1 or expression.reads_data:
            return
        (variable,) = depends
        fits = np.array([v == value for v in _values_by_root(expression, variable)])
        self._possible[variable] = self._possible.get(variable, True) & fits
        if not self._possible[variable].any():
            raise _Dead

    def _see(self, expression: Expr) -> None:
        """Notes the data that an expression reads."""
        if isinstance(expression, Observed):
            self._meet(expression.values, "observed values")
        elif isinstance(expression, Apply) and expression.reads_data:
            for argument in expression.arguments:
                self._see(argument)

    def _meet(self, tensor: Tensor, what: str) -> None:
        size = tensor.shape[0]
        if self.batch is not None and size != self.batch:
            _check.fail(ValueError, "nesy", what, f"have batch size {self.batch}", size)
        self.batch = size

    def finish(self, result: Any) -> None:
        self.path.result = as_expr(result)
        self._see(self.path.result)


def _values_by_root(expression: Expr, variable: Variable) -> list[Any]:
    places = [None] * (variable.position + 1)
    found = []
    for v in variable.support.values:
        places[variable.position] = v
        found.append(evaluate(expression, places))
    return found


def _check_parent(leaf: Leaf) -> None:
    assert leaf.parent is not None
    known = leaf.source.parent_support
    assert known is not None
    if leaf.parent.reads_data:
        raise TraceError(
            f"sapwood.nesy.{leaf.source.name}: parent must be a bound value{_user_line()}, "
            "got observed data"
        )
    for value in leaf.parent.support.values:
        if value not in known.index:
            name = f"nesy.{leaf.source.name}"
            _check.fail(ValueError, name, "parent", f"be one of {known}", repr(value))


def _user_line() -> str:
    """The place in the user's file from which this package was called."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("sapwood.nesy."):
        back = frame.f_back
        if back is None:
            return ""
        frame = back
    return f" ({frame.f_code.co_filename}:{frame.f_lineno})"


def trace(program: Program, max_paths: int) -> Trace:
    """All paths of a program.

    Raises:
        TraceError: for a branch on data, more than ``max_paths`` paths, or a wrong yield.
        TiltError: for unnormalised masses below a bound value.
        UnsupportedMonadError: for draws that are not finite.
    """
    found, pending = Trace([], None, False), [list[Any]()]
    while pending:
        tracer = _Tracer(pending.pop())
        token = forcing.set(tracer)
        try:
            tracer.finish(run(program, tracer.answer))
            found.paths.append(tracer.path)
        except _Dead:
            pass
        finally:
            forcing.reset(token)
        found.runs += 1
        found.batch = _agreed(found.batch, tracer.batch)
        found.weighted |= tracer.weighted
        pending += reversed(tracer.alternatives)
        if found.runs + len(pending) > max_paths:
            raise TraceError(
                f"sapwood.nesy: a program must have at most max_paths={max_paths} paths, got more; "
                "use nesy.table or arithmetic in place of branches"
            )
    return found


def _agreed(first: int | None, second: int | None) -> int | None:
    if first is not None and second is not None and first != second:
        _check.fail(ValueError, "nesy", "data of all paths", f"have batch size {first}", second)
    return second if first is None else first


class Keys:
    """Writes a trace as a hashable key of its structure, and numbers what it reads.

    Data that are compared for equality enter without their values; wherever else they stand, the
    values they can take belong to the structure. Without ``shared`` every draw has a leaf of its
    own, so that its weights can be told from those of others.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self._shared = shared
        self.columns: list[Observed] = []
        self.leaves: list[Leaf] = []
        self._column_numbers: dict[Hashable, int] = {}
        self._leaf_numbers: dict[Hashable, int] = {}
        self._nodes: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}

    def path(self, path: Path) -> Hashable:
        """The structure of one path, without its result."""
        self._nodes, self._known = {}, {}
        leaves = tuple(
            (self.leaf(leaf), None if leaf.parent is None else self.expression(leaf.parent))
            for leaf in path.leaves
        )
        decisions = tuple(self.constraint(e) for e in path.decisions)
        return leaves, decisions, tuple(self.constraint(e) for e in path.guards)

    def nodes(self) -> Hashable:
        """All expressions of the present path."""
        return tuple(self._nodes)

    def leaf(self, leaf: Leaf) -> int:
        """The number of what a leaf evaluates; equal inputs of one source have one number."""
        key: Hashable = id(leaf)
        if self._shared:
            key = (leaf.source.key, *map(identity, leaf.inputs))
        number = self._leaf_numbers.setdefault(key, len(self.leaves))
        if number == len(self.leaves):
            self.leaves.append(leaf)
        return number

    def column(self, observed: Observed) -> int:
        """The number of a column of data."""
        number = self._column_numbers.setdefault(identity(observed.values), len(self.columns))
        if number == len(self.columns):
            self.columns.append(observed)
        return number

    def sources(self) -> Hashable:
        """What the leaves draw from, and the kinds of their inputs."""
        return tuple(
            (leaf.source.key, tuple((x.shape[1:], x.dtype, x.dim()) for x in leaf.inputs))
            for leaf in self.leaves
        )

    def constraint(self, expression: Expr) -> Hashable:
        """The key of something that has to be true."""
        found: list[Hashable] = []
        for part in conjuncts(expression):
            sides = equal_to_data(part)
            if sides is None:
                found.append(self.expression(part))
            else:
                found.append(("==", self.expression(sides[0]), self.column(sides[1])))
        return tuple(found)

    def expression(self, expression: Expr) -> int:
        """The number of an expression; equal structure gives equal numbers."""
        number = self._known.get(id(expression))
        if number is None:
            number = self._nodes.setdefault(self._node(expression), len(self._nodes))
            self._known[id(expression)] = number
        return number

    def _node(self, expression: Expr) -> Hashable:
        match expression:
            case Constant(value=value):
                return ("constant", type(value), value)
            case Variable(position=position):
                return ("variable", position)
            case Observed():
                return ("data", self.column(expression), expression.support)
            case Apply(function=function, arguments=arguments):
                return (function.key, *(self.expression(a) for a in arguments))
        raise TypeError(f"sapwood.nesy: {type(expression).__name__} must be an expression")


def equal_to_data(expression: Expr) -> tuple[Expr, Observed] | None:
    """The two sides of ``expression == observed``."""
    if not isinstance(expression, Apply) or expression.function is not EQUAL:
        return None
    if len(expression.arguments) != 2:
        return None
    left, right = expression.arguments
    if isinstance(right, Observed) and not left.reads_data:
        return left, right
    if isinstance(left, Observed) and not right.reads_data:
        return right, left
    return None


def conjuncts(expression: Expr) -> Iterator[Expr]:
    """What has to be true for an expression to be true."""
    both = isinstance(expression, Apply) and expression.function is AND
    if both and all(map(is_boolean, cast(Apply, expression).arguments)):
        for argument in cast(Apply, expression).arguments:
            yield from conjuncts(argument)
        return
    yield expression
