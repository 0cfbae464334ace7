"""NeSyCat: one definition of truth, learned symbols, exact marginalisation.

A sentence about data is a short program; a monad says what it means. Our implementation of the
ideas of arXiv 2606.19279. Where its parts stand:

- syntax and the inductive definition of truth: :mod:`sapwood.nesy.syntax`
- monads and truth algebras: :mod:`sapwood.nesy.monads`, :mod:`sapwood.nesy.algebra`
- programs in do-notation: :func:`do`, :class:`Program`
- reference semantics by enumeration: :mod:`sapwood.nesy.oracle`

Tracing, splitting of paths, the factor graph with its elimination order, stacking, best
explanations and samples from the same plan, and quadrature are our own design.
"""

from __future__ import annotations

from sapwood.nesy import mnist_add, syntax
from sapwood.nesy.algebra import LP, Algebra, Bool, Godel, LPValue, Lukasiewicz, Product
from sapwood.nesy.draws import (
    bernoulli,
    choice,
    continuous,
    guard,
    nondet,
    normal,
    observed,
    table,
    uniform,
)
from sapwood.nesy.errors import TiltError, TraceError, UnsupportedMonadError
from sapwood.nesy.giry import Estimate
from sapwood.nesy.monads import (
    Batch,
    Dist,
    GiryQuadrature,
    GirySampler,
    Identity,
    LogTens,
    MaxPlus,
    Monad,
    Powerset,
    Tens,
)
from sapwood.nesy.posterior import MAP, FiniteDistribution
from sapwood.nesy.program import Program, bind, do, fmap, unit, zip_with
from sapwood.nesy.quantifiers import exists, forall, loss
from sapwood.nesy.symbols import Categorical, Conditional, TwoSided, Weighted
from sapwood.nesy.syntax import Interpretation, truth

__all__ = [
    "LP",
    "MAP",
    "Algebra",
    "Batch",
    "Bool",
    "Categorical",
    "Conditional",
    "Dist",
    "Estimate",
    "FiniteDistribution",
    "GiryQuadrature",
    "GirySampler",
    "Godel",
    "Identity",
    "Interpretation",
    "LPValue",
    "LogTens",
    "Lukasiewicz",
    "MaxPlus",
    "Monad",
    "Powerset",
    "Product",
    "Program",
    "Tens",
    "TiltError",
    "TraceError",
    "TwoSided",
    "UnsupportedMonadError",
    "Weighted",
    "bernoulli",
    "bind",
    "choice",
    "continuous",
    "do",
    "exists",
    "fmap",
    "forall",
    "guard",
    "loss",
    "mnist_add",
    "nondet",
    "normal",
    "observed",
    "syntax",
    "table",
    "truth",
    "uniform",
    "unit",
    "zip_with",
]
