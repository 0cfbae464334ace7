"""Best explanations and posterior samples, from the plan that computes the truth.

The plan runs with another sum. Every number of it is used once, so the gradient of the result tells
which draws it came from: with a maximum the best ones, and with a sum whose gradient goes to one
term, drawn by its share, an exact sample (backward sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.nesy.execute import Execution
from sapwood.nesy.expressions import evaluate
from sapwood.nesy.plan import PLANS, Plan, Query
from sapwood.nesy.supports import Support
from sapwood.nesy.trace import Keys, Trace
from sapwood.ops.logsemiring import logsumexp

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

#: Values per row: a tensor of numbers, else an array of objects.
Values = Tensor | NDArray[Any]


@dataclass(frozen=True)
class FiniteDistribution:
    """Values and their log probabilities, (B, k) or (k,)."""

    support: tuple[Any, ...]
    log_prob: Tensor


@dataclass(frozen=True)
class MAP:
    """The most probable branch.

    ``log_weight`` is (B,). ``assignment`` has for each draw, named after its symbol and counted,
    the value in every row; where there is no mass, or the branch does not make this draw, -1 among
    integers, NaN among floats, else None. ``value`` is what the program returns, an object per row.
    """

    log_weight: Tensor
    assignment: dict[str, Values]
    value: Any


class _Drawn(torch.autograd.Function):
    """Log-sum-exp whose gradient goes to one term, drawn with probability softmax."""

    generator: torch.Generator | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return logsumexp(x, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        noise = torch.empty(x.shape, dtype=torch.float64)
        noise.exponential_(generator=_Drawn.generator)
        index = (x.double() - noise.log().to(x.device)).argmax(-1, keepdim=True)
        return torch.zeros_like(x).scatter_(-1, index, grad.unsqueeze(-1))


def _largest(x: Tensor) -> Tensor:
    return x.max(-1).values  # its gradient goes to one index


def best(program: Program, traced: Trace, query: Query) -> MAP:
    """The best branch for which the guards and, with ``Query.TRUTH``, the sentence hold."""
    found = _attribute(program, traced, query, _largest, 1)
    names, chosen = found.names(), found.chosen()
    assignment = {name: _values(support, chosen[name]) for name, support in names.items()}
    value = _results(traced, found)
    if traced.batch is None:
        assignment = {name: v[0] for name, v in assignment.items()}
        return MAP(found.weight[0], assignment, value[0])
    return MAP(found.weight, assignment, value)


def sample(
    program: Program,
    traced: Trace,
    query: Query,
    num_samples: int,
    generator: torch.Generator | None,
) -> dict[str, Values]:
    """Independent draws of all variables given the guards and, with ``Query.TRUTH``, the truth."""
    _Drawn.generator = generator
    try:
        found = _attribute(program, traced, query, _Drawn.apply, num_samples)
    finally:
        _Drawn.generator = None
    result: dict[str, Values] = {}
    for name, support in found.names().items():
        places = found.chosen()[name].reshape(-1, num_samples).T
        values = _values(support, places)
        result[name] = values[:, 0] if traced.batch is None else values
    return result


@dataclass
class _Attribution:
    """Per path and variable the place that was chosen in every row, -1 for none."""

    weight: Tensor  # (rows,)
    paths: list[dict[str, tuple[Support, Tensor]]]

    def names(self) -> dict[str, Support]:
        """All draws; one that has several supports on different paths has the union."""
        found: dict[str, Support] = {}
        for path in self.paths:
            for name, (support, _) in path.items():
                before = found.get(name)
                values = support.values if before is None else (*before.values, *support.values)
                found[name] = Support(dict.fromkeys(values))
        return found

    def chosen(self) -> dict[str, Tensor]:
        """Per draw the place in its support of :meth:`names`, (rows,)."""
        result: dict[str, Tensor] = {}
        for name, whole in self.names().items():
            places = torch.full(self.weight.shape, -1, dtype=torch.long)
            for path in self.paths:
                if name in path:
                    support, own = path[name]
                    moved = torch.tensor([*(whole.index[v] for v in support.values), -1])
                    places = torch.where(own >= 0, moved[own], places)
            result[name] = places
        return result


def _attribute(
    program: Program,
    traced: Trace,
    query: Query,
    reduce: Callable[[Tensor], Tensor],
    copies: int,
) -> _Attribution:
    keys = Keys(shared=False)
    plan = PLANS.get(traced, keys, query, everything=True)
    rows = (1 if traced.batch is None else traced.batch) * copies

    def separate(weights: Tensor) -> Tensor:
        return weights.detach().expand(rows, -1, -1).clone().requires_grad_()

    with torch.enable_grad():
        execution = Execution(
            plan, keys.leaves, [c.values for c in keys.columns], traced.batch, program.dtype,
            reduce=reduce, prepare=separate, copies=copies,
        )  # fmt: skip
        leaves = execution.slots[: len(plan.slots)]
        weight = execution.run().reshape(-1)
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if weight.requires_grad:
            grads = torch.autograd.grad(weight.sum(), leaves, allow_unused=True)
    possible = (weight.detach() > -math.inf).cpu()
    return _Attribution(weight.detach(), _read(plan, traced, grads, possible))


def _read(
    plan: Plan, traced: Trace, grads: Sequence[Tensor | None], possible: Tensor
) -> list[dict[str, tuple[Support, Tensor]]]:
    result = []
    for path, planned in zip(traced.paths, plan.paths, strict=True):
        places: dict[str, tuple[Support, Tensor]] = {}
        for name, variable, leaf in zip(path.names, path.variables, planned.leaves, strict=True):
            own = torch.full(possible.shape, -1)
            where = None if leaf is None else plan.where.get(leaf)
            grad = None if where is None else grads[where.slot]
            if grad is not None and where is not None:
                hit = grad[:, where.position].cpu()
                chosen = hit.argmax(-1).remainder(len(variable.support))
                own = torch.where((hit.amax(-1) > 0.5) & possible, chosen, -1)
            places[name] = (variable.support, own)
        result.append(places)
    return result


def _values(support: Support, places: Tensor) -> Values:
    """Values at places; -1 becomes -1, NaN or None."""
    numbers = [type(v) for v in support.values]
    if all(t is int for t in numbers) and -1 not in support.index:
        return torch.tensor([*support.values, -1])[places]
    if all(t in (int, float) for t in numbers) and float in numbers:
        return torch.tensor([*support.values, math.nan], dtype=torch.float64)[places]
    objects = np.empty(len(support) + 1, dtype=object)
    objects[:-1] = support.values
    return np.asarray(objects[places.numpy()], dtype=object)


def _results(traced: Trace, found: _Attribution) -> NDArray[Any]:
    """What the program returns in every row, given its draws."""
    rows = len(found.weight)
    values = np.empty(rows, dtype=object)
    for path, own in zip(traced.paths, found.paths, strict=True):
        taken = [own[name][1] for name in path.names]
        for row in range(rows):
            if float(found.weight[row]) == -math.inf or any(int(t[row]) < 0 for t in taken):
                continue
            drawn = [
                v.support.values[int(t[row])] for v, t in zip(path.variables, taken, strict=True)
            ]
            if all(evaluate(d, drawn, row) for d in path.decisions):
                values[row] = evaluate(path.result, drawn, row)
    return values
