"""Truth algebras and formulas as data."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sapwood import nesy
from sapwood.nesy import syntax as S
from sapwood.nesy.algebra import Algebra

DEGREES = [0.0, 0.25, 0.5, 0.75, 1.0]
CARRIERS: dict[str, tuple[Algebra, list[Any]]] = {
    "Bool": (nesy.Bool, [False, True]),
    "LP": (nesy.LP, list(nesy.LPValue)),
    "Product": (nesy.Product, DEGREES),
    "Godel": (nesy.Godel, DEGREES),
    "Lukasiewicz": (nesy.Lukasiewicz, DEGREES),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_lattice_monoids_and_negation(name: str) -> None:
    algebra, values = CARRIERS[name]
    conj, disj, neg = algebra.conjunction, algebra.disjunction, algebra.negate
    for x, y, z in itertools.product(values, repeat=3):
        assert conj(conj(x, y), z) == conj(x, conj(y, z))
        assert disj(disj(x, y), z) == disj(x, disj(y, z))
        assert algebra.meet(algebra.meet(x, y), z) == algebra.meet(x, algebra.meet(y, z))
        assert conj(x, y) == conj(y, x)
        assert disj(x, y) == disj(y, x)
        assert conj(x, algebra.top) == x == disj(x, algebra.bottom)
        assert neg(conj(x, y)) == disj(neg(x), neg(y))
        assert algebra.meet(x, algebra.join(x, y)) == x == algebra.join(x, algebra.meet(x, y))
        assert neg(neg(x)) == x
        assert algebra.implies(x, y) == disj(neg(x), y)


@pytest.mark.parametrize("name", ["Bool", "Product", "Godel", "Lukasiewicz"])
def test_residuum_is_adjoint(name: str) -> None:
    algebra, values = CARRIERS[name]
    for x, y, z in itertools.product(values, repeat=3):
        assert (algebra.conjunction(x, z) <= y) == (z <= algebra.residuum(x, y))


def test_lp_keeps_the_paradox() -> None:
    both = nesy.LPValue.BOTH
    assert nesy.LP.negate(both) is both
    assert nesy.LP.conjunction(both, nesy.LP.negate(both)).designated
    assert not nesy.LPValue.FALSE.designated
    found = [nesy.LP.from_degree(d) for d in (0.0, 0.2, 0.5, 0.6, 0.9)]
    assert found == [0, 0, 1, 1, 2]


def test_degrees_outside_the_interval() -> None:
    with pytest.raises(ValueError, match=r"degree must lie in \[0, 1\], got 1.5"):
        nesy.Godel.from_degree(1.5)


def test_fuzzy_connectives_have_gradients() -> None:
    x = torch.tensor([0.9, 0.3], requires_grad=True)
    y = torch.tensor([0.5, 0.2])
    for algebra in (nesy.Product, nesy.Godel, nesy.Lukasiewicz):
        value = algebra.conjunction(x, y) + algebra.disjunction(x, y)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert bool(grad.isfinite().all())


@pytest.fixture(name="theory")
def friends_of_smokers() -> S.Term:
    x, y = S.Var("x", "Person"), S.Var("y", "Person")
    friends, smokes = S.relation("friends", "Person", "Person"), S.relation("smokes", "Person")
    return S.Forall(x, S.Forall(y, (friends(x, y) & smokes(x)).implies(smokes(y))))


@pytest.mark.parametrize(
    ("algebra", "expected"),
    [
        (nesy.Bool, False),
        (nesy.LP, nesy.LPValue.BOTH),
        (nesy.Product, 0.4416),
        (nesy.Godel, 0.4),
        (nesy.Lukasiewicz, 0.5),
    ],
)
def test_one_theory_in_five_algebras(theory: S.Term, algebra: Algebra, expected: Any) -> None:
    people = {"Person": ["ann", "bob", "cem"]}
    degree = {"ann": 0.9, "bob": 0.4, "cem": 0.1}
    symbols = {
        "smokes": lambda a: algebra.from_degree(degree[a]),
        "friends": lambda a, b: algebra.from_degree(float({a, b} == {"ann", "bob"})),
    }
    found = S.truth(theory, nesy.Interpretation(nesy.Identity, algebra, people, symbols))
    assert found == pytest.approx(expected, abs=1e-12)


def test_quantifiers_bind_monadic_truths() -> None:
    """Exists of independent uncertain truths: 1 - (1-p)(1-q); with Forall inside Do."""
    x = S.Var("x", "Coin")
    formula = S.Exists(x, S.relation("heads", "Coin")(x))
    dist = nesy.Dist
    symbols = {"heads": lambda p: dist.from_probabilities([True, False], [p, 1 - p])}
    reading = nesy.Interpretation(dist, nesy.Bool, {"Coin": [0.5, 0.25]}, symbols)
    assert S.truth(formula, reading)[True] == pytest.approx(1 - 0.5 * 0.75)
    a, b = S.Var("a"), S.Var("b")
    draw = S.App("heads", (S.Const(0.5),))
    do = S.Do(((a, draw), (b, draw)), S.Return(S.meet(a, b) | ~S.join(a, b)))
    assert S.truth(do, reading)[True] == pytest.approx(0.5)


def test_errors_of_formulas(theory: S.Term) -> None:
    with pytest.raises(ValueError, match="sort must be one of"):
        S.truth(theory, nesy.Interpretation(nesy.Identity, nesy.Bool))
    with pytest.raises(ValueError, match="variable must be one of"):
        S.truth(S.Var("q"), nesy.Interpretation(nesy.Identity, nesy.Bool))
    with pytest.raises(ValueError, match=r"smokes must take sorts \('Person',\), got \('Dog',\)"):
        S.relation("smokes", "Person")(S.Var("d", "Dog"))
    with pytest.raises(TypeError, match="formula must be a term, got int"):
        S.truth(3, nesy.Interpretation(nesy.Identity, nesy.Bool))  # type: ignore[arg-type]
