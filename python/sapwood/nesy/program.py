"""Programs: sentences about uncertain values, written with binds.

A function decorated with :func:`do` yields draws, guards and other programs, gets their values, and
returns an expression. Calling it makes a :class:`Program`; nothing runs until its truth, its
distribution, its best explanation or samples are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import explain, giry, joint, oracle, posterior, static
from sapwood.nesy.draws import ChoiceLeaf, ContinuousLeaf, Leaf, NondetLeaf
from sapwood.nesy.errors import TiltError, TraceError, UnsupportedMonadError
from sapwood.nesy.execute import Execution
from sapwood.nesy.expressions import Constant, is_boolean
from sapwood.nesy.monads import (
    Batch,
    FiniteMonad,
    GirySampler,
    LogTens,
    MaxPlus,
    Monad,
    Powerset,
)
from sapwood.nesy.plan import PLANS, Plan, Query
from sapwood.nesy.posterior import MAP, FiniteDistribution
from sapwood.nesy.trace import Keys, Trace, trace
from sapwood.ops.logsemiring import log_normalize

Drawn = Leaf | ChoiceLeaf | NondetLeaf | ContinuousLeaf
_NORMALISATIONS = ("prior", "evidence", "none")


@dataclass(frozen=True, eq=False)
class Program:
    """A sentence or an uncertain value, not yet evaluated. Made by calling a ``do`` function.

    Example:
        >>> from sapwood import nesy
        >>> @nesy.do
        ... def rain_and_wind():
        ...     rain = yield nesy.bernoulli(0.5)
        ...     wind = yield nesy.bernoulli(nesy.table({True: 0.8, False: 0.1})[rain])
        ...     return rain & wind
        >>> rain_and_wind().log_truth().exp()
        tensor(0.4000)

    Args:
        function: gives a generator, or at once a value.
        arguments: of the function.
        options: its keyword arguments.
        max_paths: bound on the ways through the program.
        dtype: of the weights; None for that of the networks.
        static: take the structure from the first call (see :func:`do`).
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    max_paths: int = 1024
    dtype: torch.dtype | None = None
    static: bool = False

    def start(self) -> Generator[Any, Any, Any] | Any:
        """Calls the function: a fresh generator, or a value."""
        return self.function(*self.arguments, **self.options)

    def double(self) -> Program:
        """The program with all weights in float64; the networks stay as they are."""
        return replace(self, dtype=torch.float64)

    def log_truth(self, normalize: str = "prior", *, strict: bool = False) -> Tensor:
        """The log probability that the sentence is true, differentiable.

        Args:
            normalize: "prior": a failed guard counts as false; "evidence": given that the guards
                hold; "none": the mass as it is, which differs from "prior" only for
                :class:`Weighted` symbols.
            strict: build the joint of all draws instead of eliminating them; for comparisons.

        Returns:
            (B,), or a scalar for a program without data. -inf where it cannot be true.

        Raises:
            ValueError: for an unknown ``normalize``, batch sizes that differ, or a joint above
                1e8 entries.
            TypeError: when the program returns something else than a truth value.
            TraceError: for a branch on data, or too many paths.
        """
        _check.one_of("nesy.log_truth", "normalize", normalize, _NORMALISATIONS)
        if strict:
            traced = self._traced()
            mass = joint.log_mass(traced, Query.TRUTH, self.dtype)
            return self._normalised(mass, normalize, traced, strict=True)
        if self.static and normalize == "prior":
            found = static.log_truth(self)
            if found is not None:
                return found
        traced = self._traced()
        return self._normalised(self._mass(traced, Query.TRUTH), normalize, traced)

    def truth(self, monad: Monad = LogTens, **options: Any) -> Any:
        """The truth in a monad.

        Args:
            monad: LogTens and MaxPlus run compiled; Identity, Powerset, Dist, Tens, GiryQuadrature
                and ``Batch`` of them enumerate the branches of every row; GirySampler draws.
            **options: of GirySampler ``num_samples`` and ``seed``, of GiryQuadrature ``nodes``.

        Returns:
            Identity: the truth value. Powerset: the set of possible ones (a list of sets with
            rows). Dist: the probability given the guards, float64. Tens, GiryQuadrature: the mass.
            LogTens: the log truth. MaxPlus: the log weight of the best branch that is true.
            GirySampler: an :class:`Estimate`.

        Raises:
            UnsupportedMonadError: when the program does what the monad cannot.
        """
        if monad is LogTens:
            return self.log_truth(**options)
        if monad is MaxPlus:
            return posterior.best(self, self._traced(), Query.TRUTH).log_weight
        if monad is GirySampler:
            return giry.estimate(self, **options)
        row_monad = monad.monad if isinstance(monad, Batch) else monad
        if not isinstance(row_monad, FiniteMonad):
            values, has_rows = oracle.batched(self, row_monad, self.dtype, batch=self._batch())
            return values if has_rows else values[0]
        return self._enumerated(row_monad, options)

    def _enumerated(self, monad: FiniteMonad, options: dict[str, Any]) -> Any:
        """Truth by enumeration; guards fail in Tens, then Dist normalises."""
        inner = monad
        if not monad.guards:
            inner = FiniteMonad("Tens", monad.semiring, monad.number)
        batch = self._batch()
        values, has_rows = oracle.batched(self, inner, self.dtype, batch=batch, **options)
        if monad is Powerset:
            sets = [set(v) for v in values]
            return sets if has_rows else sets[0]
        weights = [v.get(True, monad.semiring.zero) for v in values]
        if not monad.guards:
            masses = [inner.mass(v) for v in values]
            if any(mass == 0 for mass in masses):
                raise UnsupportedMonadError(
                    f"sapwood.nesy: {monad.name} must have mass to normalise, the guards left none"
                )
            weights = [w / mass for w, mass in zip(weights, masses, strict=True)]
        if monad.number is not float and monad.semiring.one == 1 and not has_rows:
            return weights[0]  # exact numbers stay exact
        found = torch.tensor([float(w) for w in weights], dtype=torch.float64)
        return found if has_rows else found[0]

    def distribution(self) -> FiniteDistribution:
        """What the program returns, given that its guards hold.

        Example:
            >>> from sapwood import nesy
            >>> roll = nesy.uniform(range(1, 7))
            >>> total = nesy.zip_with(lambda a, b: a + b, roll, roll).distribution()
            >>> total.support, round(total.log_prob.exp()[5].item(), 4)
            ((2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), 0.1667)

        Returns:
            The values and their log probabilities: (B, k), or (k,) without data.
        """
        log_mass, plan = self._run(self._traced(), Query.VALUES)
        assert plan.support is not None
        return FiniteDistribution(plan.support.values, log_normalize(log_mass, -1))

    def map(self) -> MAP:
        """The most probable draws for which the guards hold and, of a sentence, it is true.

        Returns:
            The log weight (B,), the value of each named draw, and the program's value.
        """
        traced = self._traced()
        query = Query.TRUTH if self._is_sentence(traced) else Query.EVIDENCE
        return posterior.best(self, traced, query)

    def sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> dict[str, posterior.Values]:
        """Exact draws from the posterior: given the guards and, of a sentence, its truth.

        Args:
            num_samples: independent draws per row.
            generator: of the randomness; default torch's.

        Returns:
            For each named draw its values, (num_samples, B) or (num_samples,): a tensor of
            integers or floats, else an array of objects. Draws that a path does not reach, and
            rows of no mass, are -1, NaN or None.
        """
        if num_samples < 1:
            _check.fail(ValueError, "nesy.sample", "num_samples", "be at least 1", num_samples)
        traced = self._traced()
        query = Query.TRUTH if self._is_sentence(traced) else Query.EVIDENCE
        return posterior.sample(self, traced, query, num_samples, generator)

    def explain(self) -> str:
        """How the truth is computed: variables, factors, order, kernels, cost, network calls."""
        traced = self._traced()
        keys = Keys()
        query = Query.TRUTH if self._is_sentence(traced) else Query.VALUES
        return explain.text(PLANS.get(traced, keys, query), keys)

    def _batch(self) -> int | None:
        """The rows of all data, also of what single rows do not reach; None where it cannot be."""
        try:
            return self._traced().batch
        except (TraceError, TiltError, UnsupportedMonadError):
            return None

    def _traced(self) -> Trace:
        return trace(self, self.max_paths)

    def _is_sentence(self, traced: Trace) -> bool:
        return all(is_boolean(path.result) for path in traced.paths)

    def _check_sentence(self, traced: Trace) -> None:
        for path in traced.paths:
            if not is_boolean(path.result):
                found = path.result
                got = repr(found.value) if isinstance(found, Constant) else str(found.support)
                _check.fail(TypeError, "nesy.log_truth", "program", "return a truth value", got)

    def _mass(self, traced: Trace, query: Query) -> Tensor:
        if query is Query.TRUTH:
            self._check_sentence(traced)
        return self._run(traced, query)[0]

    def _run(self, traced: Trace, query: Query) -> tuple[Tensor, Plan]:
        keys = Keys()
        plan = PLANS.get(traced, keys, query)
        execution = Execution(
            plan, keys.leaves, [c.values for c in keys.columns], traced.batch, self.dtype
        )
        return execution.run(), plan

    def _normalised(
        self, mass: Tensor, normalize: str, traced: Trace, *, strict: bool = False
    ) -> Tensor:
        if normalize == "none" or (normalize == "prior" and not traced.weighted):
            return mass
        query = Query.PRIOR if normalize == "prior" else Query.EVIDENCE
        if strict:
            total = joint.log_mass(traced, query, self.dtype)
        else:
            total = self._mass(traced, query)
        possible = total > -torch.inf
        return mass - torch.where(possible, total, 0.0)


class Do:
    """A function that makes programs; what :func:`do` returns."""

    def __init__(self, function: Callable[..., Any], max_paths: int, static: bool) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._max_paths = max_paths
        self._static = static

    def __call__(self, *arguments: Any, **options: Any) -> Program:
        return Program(
            self._function, arguments, options, max_paths=self._max_paths, static=self._static
        )


@overload
def do(function: Callable[..., Any], /) -> Do: ...
@overload
def do(*, max_paths: int = 1024, static: bool = False) -> Callable[[Callable[..., Any]], Do]: ...
def do(
    function: Callable[..., Any] | None = None, /, *, max_paths: int = 1024, static: bool = False
) -> Do | Callable[[Callable[..., Any]], Do]:
    """Turns a generator function into a function that makes programs.

    Example:
        >>> from sapwood import nesy
        >>> @nesy.do
        ... def doubles():
        ...     first = yield nesy.uniform(range(1, 7))
        ...     second = yield nesy.uniform(range(1, 7))
        ...     return first == second
        >>> doubles().truth(nesy.Dist)
        tensor(0.1667, dtype=torch.float64)

    Bound values support arithmetic, comparisons and ``& | ~``; ``nesy.table`` looks them up.
    ``if``, ``and``, ``or``, ``not``, ``in`` and ``int`` work too: the run splits into paths.

    Args:
        function: yields draws, guards and programs, returns the sentence.
        max_paths: bound on the number of paths.
        static: promise that the function does the same for all arguments of one shape, so that
            later calls of ``log_truth`` do not run it. Its draws must read slices of the
            arguments; otherwise it is traced as usual, which is logged once.

    Returns:
        A function with the same arguments that returns a :class:`Program`.
    """
    if function is None:
        return lambda found: Do(found, max_paths, static)
    return Do(function, max_paths, static)


def bind(m: Program | Drawn, k: Callable[[Any], Any]) -> Program:
    """Continues a draw or program with what ``k`` makes of its value.

    Example:
        >>> from sapwood import nesy
        >>> coin = nesy.bernoulli(0.5)
        >>> nesy.bind(coin, lambda a: nesy.fmap(lambda b: a & b, coin)).truth(nesy.Dist)
        tensor(0.2500, dtype=torch.float64)
    """

    def run() -> Generator[Any, Any, Any]:
        value = yield m
        return (yield k(value))

    return Program(run)


def fmap(f: Callable[[Any], Any], m: Program | Drawn) -> Program:
    """Applies a function to the value of a draw or program.

    Example:
        >>> from sapwood import nesy
        >>> nesy.fmap(lambda roll: roll > 4, nesy.uniform(range(1, 7))).truth(nesy.Dist)
        tensor(0.3333, dtype=torch.float64)
    """
    return zip_with(f, m)


def zip_with(f: Callable[..., Any], *ms: Program | Drawn) -> Program:
    """Applies a function to the values of independent draws or programs.

    Example:
        >>> from sapwood import nesy
        >>> roll = nesy.uniform(range(1, 7))
        >>> nesy.zip_with(lambda a, b: a + b == 7, roll, roll).truth(nesy.Dist)
        tensor(0.1667, dtype=torch.float64)
    """

    def run() -> Generator[Any, Any, Any]:
        values = []
        for m in ms:
            values.append((yield m))
        return f(*values)

    return Program(run)


def unit(value: Any) -> Program:
    """The program that returns a value for certain.

    Example:
        >>> from sapwood import nesy
        >>> nesy.unit(True).truth(nesy.Identity)
        True
    """
    return Program(lambda: value)
