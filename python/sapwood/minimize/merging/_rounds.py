"""Merging until nothing merges any more, every step tried before it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sapwood.minimize._analysis import Options, Outcome, analysed_trace
from sapwood.minimize._trace import Inputs, Traced, traced
from sapwood.minimize.layers import Edit
from sapwood.minimize.merging._chains import idle_units, products
from sapwood.minimize.merging._units import merges
from sapwood.minimize.plan import Refusal
from sapwood.minimize.surgery import operate
from sapwood.minimize.verify import TOLERANCE, Reference, difference, draws

__all__ = ["Merged", "merged"]


@dataclass(frozen=True)
class Merged:
    """A network whose merged units nobody reads, what the exact rules find in it, and the way."""

    model: nn.Module
    outcome: Outcome
    edits: list[Edit]
    refusals: list[Refusal]


@dataclass(frozen=True)
class _GivenUp:
    """By operation: layer -> why the operation was not done on it."""

    merge: dict[str, str]
    multiply: dict[str, str]
    thin: dict[str, str]

    def add(self, edit: Edit, reason: str) -> None:
        """Never to be tried again."""
        table: dict[str, str] = getattr(self, edit["op"])
        table[edit["module"]] = reason

    def refusals(self) -> list[Refusal]:
        """Of layers as a whole; a sweep names the units that do not merge."""
        whole = {"not multiplied out": self.multiply, "keeps what nobody reads": self.thin}
        return [
            Refusal(layer, 0, f"{what}: {why}")
            for what, table in whole.items()
            for layer, why in table.items()
        ]


def merged(model: nn.Module, inputs: Inputs, options: Options) -> Merged:
    """Merges units of a plain float64 model in evaluation mode; the model is not changed."""
    drawn = [options.promises.kept(model, fresh) for fresh in draws(inputs, 2)]
    expected = [Reference.of(model, trial) for trial in (inputs, *drawn)]
    current, edits = model, list[Edit]()
    given_up = _GivenUp({}, {}, {})
    while True:
        with traced(current, inputs) as trace:
            outcome = analysed_trace(current, trace, options)
            found, refusals = _next(current, trace, outcome, given_up)
        if not found:
            return Merged(current, outcome, edits, [*refusals, *given_up.refusals()])
        taken = _taken(current, found, expected, given_up)
        if taken:
            current = operate(current, taken).requires_grad_(True)
            edits += taken


def _next(
    model: nn.Module, trace: Traced, outcome: Outcome, given_up: _GivenUp
) -> tuple[list[Edit], list[Refusal]]:
    """Merges; without any, products; without any, what computes for nobody."""
    found, refusals = merges(model, trace, outcome, given_up.merge)
    found = found or products(trace, outcome, given_up.multiply)
    return found or idle_units(model, outcome, given_up.thin), refusals


def _taken(
    current: nn.Module, found: list[Edit], expected: list[Reference], given_up: _GivenUp
) -> list[Edit]:
    """The edits in front of the first one that fails, which is given up; mostly all of them.

    Those behind may build on it, and are found anew where they do not.
    """
    if _problem(expected, operate(current, found)) is None:
        return found
    for count, edit in enumerate(found):
        problem = _problem(expected, operate(current, found[: count + 1]))
        if problem is not None:
            given_up.add(edit, problem)
            return found[:count]
    return found


def _problem(expected: list[Reference], changed: nn.Module) -> str | None:
    """What is wrong with the changed network, if anything."""
    try:
        worst = max(difference(reference, changed) for reference in expected)
    except Exception as failure:
        lines = str(failure).splitlines() or [type(failure).__name__]
        return f"the model's code does not follow ({lines[0]})"
    return None if worst <= TOLERANCE else f"the outputs would differ by {worst:.1e}"
