"""Values of a traced program: constants, bound variables, data, and what is computed from them.

A program sees these objects in place of numbers. Every finite expression has a *support*, the
values it can take. A function of expressions is known by its table over the supports, which is
computed once per function and supports.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy.errors import TraceError
from sapwood.nesy.supports import Function, Indices, Support, tabulate


class Forcing(Protocol):
    """What decides when Python needs to know a value."""

    def force(self, expression: Expr) -> Any: ...


#: The run that is going on in this thread, if there is one.
forcing: ContextVar[Forcing | None] = ContextVar("sapwood.nesy.forcing", default=None)


def _negation(x: Any) -> Any:
    return not x if isinstance(x, bool | np.bool_) else ~x


def _operator(name: str, call: Callable[..., Any]) -> Function:
    return Function(name, call, name)


EQUAL = _operator("==", operator.eq)
AND = _operator("&", operator.and_)
OR = _operator("|", operator.or_)
NOT = _operator("~", _negation)
ADD = _operator("+", operator.add)
TRUTH = _operator("bool", bool)
_ITEM = _operator("[]", operator.getitem)


def _binary(function: Function) -> Any:
    return lambda self, other: self._apply(function, self, other)


def _reflected(function: Function) -> Any:
    return lambda self, other: self._apply(function, other, self)


class Operators:
    """Python's operators on a value, through ``_apply``."""

    __slots__ = ()
    __hash__ = object.__hash__
    __iter__ = None  # else Python would iterate through __getitem__, for ever

    @staticmethod
    def _apply(function: Function, *arguments: Any) -> Any:
        raise NotImplementedError

    def __invert__(self) -> Any:
        return self._apply(NOT, self)

    def __neg__(self) -> Any:
        return self._apply(_operator("neg", operator.neg), self)

    def __abs__(self) -> Any:
        return self._apply(_operator("abs", abs), self)

    def __getitem__(self, item: Any) -> Any:
        return self._apply(_ITEM, self, item)

    __add__, __radd__ = _binary(ADD), _reflected(ADD)
    __and__, __rand__ = _binary(AND), _reflected(AND)
    __or__, __ror__ = _binary(OR), _reflected(OR)
    __eq__ = _binary(EQUAL)


_COMPARISONS = {"ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {
    "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**", "xor": "^"
}  # fmt: skip
for _name, _shown in (_COMPARISONS | _ARITHMETIC).items():
    _function = _operator(_shown, getattr(operator, _name))
    setattr(Operators, f"__{_name}__", _binary(_function))
    if _name in _ARITHMETIC:
        setattr(Operators, f"__r{_name}__", _reflected(_function))


class Expr(Operators):
    """A value of a program; Python may compute with it, and decide by it."""

    __slots__ = ("__weakref__",)

    @staticmethod
    def _apply(function: Function, *arguments: Any) -> Any:
        return apply(function, *arguments)

    @property
    def support(self) -> Support:
        """The values it can take; only without data."""
        raise NotImplementedError

    @property
    def reads_data(self) -> bool:
        """Whether it differs between rows for a reason other than chance."""
        return False

    def compute(self, function: Function, arguments: Sequence[Expr]) -> Expr | None:
        """A function of this and other values, where it is computed at once."""
        return None

    def __bool__(self) -> bool:
        return bool(_force(apply(TRUTH, self)))

    def __int__(self) -> int:
        return int(_force(self))

    def __index__(self) -> int:
        return operator.index(_force(self))

    def __float__(self) -> float:
        return float(_force(self))


def _force(expression: Expr) -> Any:
    if isinstance(expression, Constant):
        return expression.value
    run = forcing.get()
    if run is None:
        raise TraceError("sapwood.nesy: a bound value must stay inside its program, got outside")
    return run.force(expression)


class Constant(Expr):
    """A plain value."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def support(self) -> Support:
        return Support((self.value,))

    def __repr__(self) -> str:
        return repr(self.value)


class Variable(Expr):
    """What a bind gave: one value of a support, by chance."""

    __slots__ = ("_support", "position")

    def __init__(self, position: int, support: Support) -> None:
        self.position = position
        self._support = support

    @property
    def support(self) -> Support:
        return self._support


class Observed(Expr):
    """Data: certain within a row, different between rows.

    Args:
        values: (B, ...); one column (B,) to compute with, else slice first: ``n[:, 0]``.
        given: the values that can occur; by default those that do.
    """

    __slots__ = ("_found", "given", "values")

    def __init__(self, values: Tensor, given: Support | None) -> None:
        self.values = values
        self.given = given
        self._found = given

    def __getitem__(self, item: Any) -> Observed:
        return Observed(self.values[item], self.given)

    @property
    def support(self) -> Support:
        if self._found is None:
            self._found = Support(torch.unique(self.values).tolist())
        return self._found

    @property
    def reads_data(self) -> bool:
        return True

    def row(self, row: int) -> Any:
        """The plain value of one row."""
        return self.values[row].item()


class Apply(Expr):
    """A function of expressions, none of which is constant."""

    __slots__ = ("_reads_data", "_table", "arguments", "function")

    def __init__(self, function: Function, arguments: tuple[Expr, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self._reads_data = any(a.reads_data for a in arguments)
        self._table: tuple[Support, Indices] | None = None

    @property
    def table(self) -> Indices:
        """For every combination of the arguments' values the place of the result's value."""
        return self._tabulated[1]

    @property
    def support(self) -> Support:
        return self._tabulated[0]

    @property
    def _tabulated(self) -> tuple[Support, Indices]:
        if self._table is None:
            self._table = tabulate(self.function, tuple(a.support for a in self.arguments))
        return self._table

    @property
    def reads_data(self) -> bool:
        return self._reads_data


def as_expr(value: Any) -> Expr:
    """The value itself, or the constant."""
    return value if isinstance(value, Expr) else Constant(value)


def apply(function: Function, *arguments: Any) -> Expr:
    """A function of values; computed at once where all are constant."""
    expressions = [as_expr(a) for a in arguments]
    constants = {i: e.value for i, e in enumerate(expressions) if isinstance(e, Constant)}
    if len(constants) == len(expressions):
        return Constant(function.call(*constants.values()))
    for e in expressions:
        computed = e.compute(function, expressions)
        if computed is not None:
            return computed
        if isinstance(e, Observed) and e.values.dim() != 1:
            shape = tuple(e.values.shape)
            _check.fail(ValueError, "nesy", "observed values", "have one column, shape (B,)", shape)
    if function in (AND, OR) and constants:
        short = _short_circuit(function, *expressions)
        if short is not None:
            return short
    if constants:
        function = function.fixed(constants, len(expressions))
        expressions = [e for e in expressions if not isinstance(e, Constant)]
    return Apply(function, tuple(expressions))


def _short_circuit(function: Function, left: Expr, right: Expr) -> Expr | None:
    constant, other = (left, right) if isinstance(left, Constant) else (right, left)
    value = cast(Constant, constant).value
    if not isinstance(value, bool | np.bool_) or not is_boolean(other):
        return None
    return constant if value == (function is OR) else other


def is_boolean(expression: Expr) -> bool:
    """Whether it can only be true or false; comparisons of data are not tabulated for it."""
    if isinstance(expression, Apply) and expression.reads_data:
        name = expression.function.name
        if name in ("==", "bool", *_COMPARISONS.values()):
            return True
        return name in ("&", "|", "~") and all(map(is_boolean, expression.arguments))
    return expression.support.boolean


def evaluate(expression: Expr, variables: Sequence[Any], row: int | None = None) -> Any:
    """The plain value of an expression: of one row, given the values of the variables."""
    match expression:
        case Constant():
            return expression.value
        case Variable():
            return variables[expression.position]
        case Observed():
            return expression.row(cast(int, row))
        case Apply():
            return expression.function.call(
                *(evaluate(a, variables, row) for a in expression.arguments)
            )
    raise TypeError(f"sapwood.nesy: {type(expression).__name__} must be an expression")


def roots(expression: Expr) -> set[Variable]:
    """The variables an expression depends on."""
    if isinstance(expression, Variable):
        return {expression}
    if isinstance(expression, Apply):
        return set().union(*(roots(a) for a in expression.arguments))
    return set()


def as_tuple(items: Sequence[Any]) -> Expr:
    """The tuple of some values, as a function of as few expressions as determine all of them.

    ``(p, 1 - p)`` is a function of p alone: the combinations of p and 1 - p cannot all occur.
    """
    expressions = [as_expr(item) for item in items]
    frontier = [e for e in dict.fromkeys(expressions) if not isinstance(e, Constant)]
    while len(frontier) > 1 and any(isinstance(e, Apply) for e in frontier):
        deepest = max((e for e in frontier if isinstance(e, Apply)), key=_depth)
        rest = [e for e in frontier if e is not deepest]
        frontier = list(dict.fromkeys((*rest, *deepest.arguments)))
    places = {id(e): i for i, e in enumerate(frontier)}

    def call(*values: Any) -> tuple[Any, ...]:
        return tuple(_evaluated(e, places, values) for e in expressions)

    key = ("tuple", tuple(_structure(e, places) for e in expressions))
    return apply(Function("tuple", call, key), *frontier)


def _depth(expression: Expr) -> int:
    return 1 + max(map(_depth, getattr(expression, "arguments", ())), default=0)


def _evaluated(expression: Expr, places: dict[int, int], values: Sequence[Any]) -> Any:
    if id(expression) in places:
        return values[places[id(expression)]]
    if isinstance(expression, Constant):
        return expression.value
    arguments = cast(Apply, expression).arguments
    return cast(Apply, expression).function.call(
        *(_evaluated(a, places, values) for a in arguments)
    )


def _structure(expression: Expr, places: dict[int, int]) -> Hashable:
    if id(expression) in places:
        return places[id(expression)]
    if isinstance(expression, Constant):
        return ("constant", type(expression.value), expression.value)
    found = cast(Apply, expression)
    return (found.function.key, *(_structure(a, places) for a in found.arguments))


class Table:
    """A sequence or mapping as a function: ``table[d]`` is a value, not a branch."""

    def __init__(self, content: Any) -> None:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        self._content = dict(items)
        self._function = Function("table", self._content.__getitem__, ("table", _frozen(content)))

    def __getitem__(self, item: Any) -> Any:
        return apply(self._function, item) if isinstance(item, Expr) else self._content[item]


def _frozen(content: Any) -> Hashable:
    if isinstance(content, dict):
        pairs = ((type(k), k, type(v), v) for k, v in content.items())
        return ("mapping", tuple(pairs))
    return ("sequence", tuple((type(v), v) for v in content))
