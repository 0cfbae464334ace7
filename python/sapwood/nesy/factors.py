"""A path of a trace as a factor graph: variables, weights over them, and functions between them.

Functions stay index maps: ``y = f(v, w)`` is a table of the places of y's values, never a tensor
full of -inf. What has to be true becomes evidence, a variable whose value is known: the same for
all rows, or looked up in a column of data.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from sapwood.nesy.errors import TraceError
from sapwood.nesy.expressions import EQUAL, Apply, Constant, Expr, Observed, Variable
from sapwood.nesy.supports import Function, Indices, Support, tabulate
from sapwood.nesy.trace import Keys, Path, conjuncts, equal_to_data

_LONGEST_NAME = 40
_SAME = Function("same", lambda x: x, "same")


@dataclass(frozen=True)
class Known:
    """The value of a variable: a place in its support, or a column of data to look up."""

    place: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class Weight:
    """Log weights over some variables, from leaf number ``leaf``.

    ``rows`` are the parent's values in the order of the parent variable's support, as places in the
    order of the source; ``fixed`` says that the parent is constant.
    """

    scope: tuple[int, ...]
    leaf: int
    rows: tuple[int, ...] | None = None
    fixed: bool = False
    parents: int = 1  # values of the source's parent


@dataclass(frozen=True)
class Map:
    """``output`` as a function of ``arguments``: the table of its places."""

    output: int
    arguments: tuple[int, ...]
    table: Indices


@dataclass
class Graph:
    """What is to be summed: the product of ``weights`` where all maps and evidence agree."""

    supports: list[Support] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    known: dict[int, Known] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    definitions: dict[str, str] = field(default_factory=dict)  # of names that stand for long ones
    possible: bool = True  # False: some constraint can never hold


class GraphBuilder:
    """Builds the graph of one path, with only what the constraints depend on.

    A draw that nothing uses has mass one and is left out, unless ``everything`` is asked for or its
    masses are not normalised.
    """

    def __init__(self, path: Path, keys: Keys, *, everything: bool = False) -> None:
        self.graph = Graph()
        self._path = path
        self._keys = keys
        self._variables: dict[Hashable, int] = {}
        self._visited: dict[int, int] = {}
        for variable, leaf in zip(path.variables, path.leaves, strict=True):
            if everything or not leaf.source.normalised:
                self.visit(variable)

    def require(self, expressions: Iterable[Expr]) -> None:
        """Adds constraints: all of these are true."""
        for expression in expressions:
            for part in conjuncts(expression):
                self._require(part)

    def keep(self, expression: Expr) -> None:
        """Leaves the value of an expression open: one result for each."""
        variable = self.visit(expression)
        if variable in self.graph.known:
            variable = self._copy(variable)
        self.graph.kept = (*self.graph.kept, variable)

    def _require(self, expression: Expr) -> None:
        if isinstance(expression, Constant):
            self.graph.possible &= bool(expression.value)
            return
        sides = equal_to_data(expression)
        if sides is not None:
            self._set(self.visit(sides[0]), Known(column=self._keys.column(sides[1])))
            return
        if isinstance(expression, Apply) and len(expression.arguments) == 1:
            constant = _compared_constant(expression)
            if constant is not None and not expression.reads_data:
                self._fix(expression.arguments[0], constant[0])
                return
        self._fix(expression, True)

    def _fix(self, expression: Expr, value: object) -> None:
        place = expression.support.index.get(value)
        if place is None:
            self.graph.possible = False
        elif len(expression.support) > 1:
            self._set(self.visit(expression), Known(place=place))

    def _set(self, variable: int, known: Known) -> None:
        if self.graph.known.get(variable) == known:
            return
        if variable in self.graph.known or variable in self.graph.kept:
            variable = self._copy(variable)
        self.graph.known[variable] = known

    def _copy(self, variable: int) -> int:
        """Another variable of the same value, for a second condition on it."""
        support = self.graph.supports[variable]
        copied, table = tabulate(_SAME, (support,))
        new = self._add(copied, self.graph.names[variable])
        self.graph.maps.append(Map(new, (variable,), table))
        return new

    def visit(self, expression: Expr) -> int:
        """The variable of an expression, with all that it depends on."""
        number = self._visited.get(id(expression))
        if number is None:
            number = self._visited[id(expression)] = self._visit(expression)
        return number

    def _visit(self, expression: Expr) -> int:
        match expression:
            case Variable():
                return self._visit_variable(expression)
            case Observed():
                column = self._keys.column(expression)
                key: Hashable = ("data", column, expression.support)
                if key not in self._variables:
                    self._variables[key] = self._add(expression.support, f"data[{column}]")
                    self.graph.known[self._variables[key]] = Known(column=column)
                return self._variables[key]
            case Constant():
                return self._add(expression.support, repr(expression.value))
            case Apply():
                arguments = tuple(self.visit(a) for a in expression.arguments)
                key = (expression.function.key, arguments)
                if key not in self._variables:
                    name = self._name(expression, arguments)
                    new = self._variables[key] = self._add(expression.support, name)
                    self.graph.maps.append(Map(new, arguments, expression.table))
                return self._variables[key]
        raise TypeError(f"sapwood.nesy: {type(expression).__name__} must be an expression")

    def _visit_variable(self, variable: Variable) -> int:
        path = self._path
        own = path.variables[variable.position : variable.position + 1]
        if not own or own[0] is not variable:
            raise TraceError(
                "sapwood.nesy: a bound value must stay inside its program, got outside"
            )
        leaf = path.leaves[variable.position]
        scope: tuple[int, ...] = ()
        rows: tuple[int, ...] | None = None
        fixed = isinstance(leaf.parent, Constant)
        if leaf.parent is not None:
            known = leaf.source.parent_support
            assert known is not None
            rows = tuple(known.index[v] for v in leaf.parent.support.values)
            if not fixed:
                scope = (self.visit(leaf.parent),)
        number = self._add(variable.support, path.names[variable.position])
        parents = len(leaf.source.parent_support or (None,))
        weight = Weight((*scope, number), self._keys.leaf(leaf), rows, fixed, parents)
        self.graph.weights.append(weight)
        return number

    def _add(self, support: Support, name: str) -> int:
        self.graph.supports.append(support)
        self.graph.names.append(name)
        return len(self.graph.supports) - 1

    def _name(self, expression: Apply, arguments: tuple[int, ...]) -> str:
        """How the expression was written; a long one gets a letter and a line of its own."""
        places: list[str] = [self.graph.names[a] for a in arguments]
        function = expression.function
        if isinstance(function.key, tuple) and len(function.key) == 3:
            _, count, constants = function.key
            for place, _, value in constants:
                places.insert(place, repr(value))
            assert len(places) == count
        if len(places) == 2 and not function.name.isalpha():
            written = f"({places[0]} {function.name} {places[1]})"
        else:
            written = f"{function.name}({', '.join(places)})"
        if len(written) <= _LONGEST_NAME:
            return written
        name = f"t{len(self.graph.definitions) + 1}"
        self.graph.definitions[name] = written
        return name


def _compared_constant(expression: Apply) -> tuple[object] | None:
    """The constant c of ``x == c``."""
    if expression.function.name != EQUAL.name:
        return None
    key = expression.function.key
    ((_, _, value),) = key[2]  # type: ignore[index]
    return (value,)
