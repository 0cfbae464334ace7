"""Formulas as data, and the one inductive definition of their truth.

    [[x]](v)              = v(x)
    [[f(t1, ..., tn)]](v) = I(f)([[t1]](v), ..., [[tn]](v))
    [[return t]](v)       = unit([[t]](v))
    [[x <- t; rest]](v)   = bind([[t]](v), a -> [[rest]](v, x := a))
    [[Q x: S. t]](v)      = I(Q) over a in S of [[t]](v, x := a)

The monad, the truth algebra, the sorts and the symbols are the parameters; the definition does not
know them. Our implementation of the ideas of arXiv 2606.19279.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sapwood.nesy.algebra import Algebra, Connective
from sapwood.nesy.monads import Monad


class Term:
    """A term; one of truth type is a formula. ``&``, ``|``, ``~`` and ``implies`` combine them."""

    def __and__(self, other: Term) -> Term:
        return App(Connective.AND, (self, other))

    def __or__(self, other: Term) -> Term:
        return App(Connective.OR, (self, other))

    def __invert__(self) -> Term:
        return App(Connective.NOT, (self,))

    def implies(self, other: Term) -> Term:
        """Material implication."""
        return App(Connective.IMPLIES, (self, other))


@dataclass(frozen=True)
class Var(Term):
    """A variable of a sort.

    Example:
        >>> from sapwood.nesy import syntax as S
        >>> S.Var("x", "Person")
        Var(name='x', sort='Person')
    """

    name: str
    sort: str = ""


@dataclass(frozen=True)
class Const(Term):
    """A value, standing for itself."""

    value: Any


@dataclass(frozen=True)
class App(Term):
    """A symbol or a connective applied to terms."""

    symbol: str | Connective
    arguments: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Return(Term):
    """A plain term as a certain monadic value."""

    term: Term


@dataclass(frozen=True)
class Do(Term):
    """Binds variables one after the other, then continues with ``body``."""

    binds: tuple[tuple[Var, Term], ...]
    body: Term


@dataclass(frozen=True)
class Forall(Term):
    """The conjunction over all values of the variable's sort."""

    variable: Var
    body: Term


@dataclass(frozen=True)
class Exists(Term):
    """The disjunction over all values of the variable's sort."""

    variable: Var
    body: Term


def relation(name: str, *sorts: str) -> Callable[..., Term]:
    """A symbol as a function that builds terms.

    Example:
        >>> from sapwood.nesy import syntax as S
        >>> smokes = S.relation("smokes", "Person")
        >>> smokes(S.Var("x", "Person"))
        App(symbol='smokes', arguments=(Var(name='x', sort='Person'),))

    Args:
        name: looked up in the interpretation's symbols.
        *sorts: of the arguments; a variable must have the sort of its place.

    Raises:
        ValueError: from the built function, for a wrong number of arguments or a wrong sort.
    """

    def build(*arguments: Term) -> Term:
        found = [a.sort if isinstance(a, Var) else None for a in arguments]
        if len(found) != len(sorts) or any(
            f is not None and f != s for f, s in zip(found, sorts, strict=True)
        ):
            raise ValueError(f"sapwood.nesy: {name} must take sorts {sorts}, got {tuple(found)}")
        return App(name, arguments)

    return build


def meet(x: Term, y: Term) -> Term:
    """The lattice's and; it is idempotent in every algebra."""
    return App(Connective.MEET, (x, y))


def join(x: Term, y: Term) -> Term:
    """The lattice's or; it is idempotent in every algebra."""
    return App(Connective.JOIN, (x, y))


@dataclass(frozen=True)
class Interpretation:
    """What a formula is read in.

    Args:
        monad: the kind of uncertainty, for example ``nesy.Identity`` or ``nesy.Dist``.
        algebra: what connectives and quantifiers mean.
        sorts: the values of each sort, finitely many.
        symbols: a callable per symbol. Plain functions map values to values, symbols that are
            bound by ``Do`` return values of the monad.
    """

    monad: Monad
    algebra: Algebra
    sorts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    symbols: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def truth(
    formula: Term, interpretation: Interpretation, env: Mapping[str, Any] | None = None
) -> Any:
    """The truth of a formula: the induction at the head of this module.

    Example:
        >>> from sapwood import nesy
        >>> from sapwood.nesy import syntax as S
        >>> x = S.Var("x", "Person")
        >>> all_tall = S.Forall(x, S.relation("tall", "Person")(x))
        >>> tall = {"ann": 0.9, "bob": 0.5}
        >>> S.truth(all_tall, nesy.Interpretation(
        ...     nesy.Identity, nesy.Product, {"Person": ["ann", "bob"]}, {"tall": tall.get}))
        0.45

    Args:
        formula: a term of truth type.
        interpretation: monad, algebra, sorts and symbols.
        env: values of the free variables.

    Returns:
        A truth value of the algebra, for formulas without ``Return`` and ``Do``; else a value of
        the monad over truth values.

    Raises:
        ValueError: for a variable without a value, or an unknown symbol or sort.
    """
    i, values = interpretation, dict(env or {})
    match formula:
        case Var(name):
            return _look_up(values, name, "variable")
        case Const(value):
            return value
        case Return(term):
            return i.monad.unit(truth(term, i, values))
        case Do(((variable, term), *rest), body):
            following = Do(tuple(rest), body)
            return i.monad.bind(
                truth(term, i, values), lambda a: truth(following, i, {**values, variable.name: a})
            )
        case Do((), body):
            return truth(body, i, values)
        case App(Connective() as connective, arguments):
            return getattr(i.algebra, connective.value)(*(truth(t, i, values) for t in arguments))
        case App(symbol, arguments):
            function = _look_up(i.symbols, symbol, "symbol")
            return function(*(truth(t, i, values) for t in arguments))
        case Forall(variable, body) | Exists(variable, body):
            parts = [
                truth(body, i, {**values, variable.name: a})
                for a in _look_up(i.sorts, variable.sort, "sort")
            ]
            return _quantified(isinstance(formula, Forall), parts, i)
    raise TypeError(f"sapwood.nesy: formula must be a term, got {type(formula).__name__}")


def _quantified(universal: bool, parts: list[Any], i: Interpretation) -> Any:
    """Folds plain truth values; those of the monad are bound one by one."""
    fold = i.algebra.forall if universal else i.algebra.exists
    if not any(i.monad.holds(part) for part in parts):
        return fold(parts)

    def collect(seen: tuple[Any, ...]) -> Any:
        if len(seen) == len(parts):
            return i.monad.unit(fold(seen))
        return i.monad.bind(parts[len(seen)], lambda a: collect((*seen, a)))

    return collect(())


def _look_up(known: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in known:
        raise ValueError(f"sapwood.nesy: {kind} must be one of {sorted(known)}, got {name!r}")
    return known[name]
