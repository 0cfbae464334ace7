"""Best explanations and posterior samples against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch

from sapwood import nesy
from sapwood.nesy.expressions import evaluate
from sapwood.nesy.trace import Trace
from tests.nesy.random_programs import ROWS, Script

#: Quantiles of chi-square at 0.999, by degrees of freedom.
QUANTILES = dict(
    zip(range(1, 31), [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26,
    32.91, 34.53, 36.12, 37.70, 39.25, 40.79, 42.31, 43.82, 45.31, 46.80, 48.27, 49.73, 51.18,
    52.62, 54.05, 55.48, 56.89, 58.30, 59.70], strict=True)
)  # fmt: skip


def branches(program: nesy.Program, traced: Trace, row: int) -> dict[tuple[Any, ...], float]:
    """Weights of all assignments for which guards and sentence hold, by path and values."""
    found: dict[tuple[Any, ...], float] = {}
    for number, path in enumerate(traced.paths):
        for values in itertools.product(*(v.support.values for v in path.variables)):
            conditions = (*path.decisions, *path.guards, path.result)
            if all(evaluate(c, values, row) for c in conditions):
                weight = 0.0
                for leaf, value in zip(path.leaves, values, strict=True):
                    table = leaf.source.log_weights(*leaf.inputs, dtype=torch.float64).detach()
                    if leaf.inputs:
                        table = table[row]
                    if leaf.source.parent_support is not None:
                        parent = evaluate(leaf.parent, values, row)  # type: ignore[arg-type]
                        table = table[leaf.source.parent_support.index[parent]]
                    weight += float(table[leaf.source.support.index[value]])
                if weight > -math.inf:
                    found[(number, *values)] = weight
    return found


def test_best_explanation_of_random_programs() -> None:
    checked = 0
    for seed in range(200):
        script = Script(seed, batched=seed % 4 != 0, most=3)
        program = script.program().double()
        traced = program._traced()
        found = program.map()
        weights = found.log_weight.reshape(-1)
        for row in range(1 if traced.batch is None else ROWS):
            every = branches(program, traced, row)
            best = max(every.values(), default=-math.inf)
            assert weights[row].item() == pytest.approx(best, rel=1e-12, abs=1e-12), seed
            if best > -math.inf:
                assert chosen_weight(found, traced, every, row) == pytest.approx(best), seed
                checked += 1
    assert checked > 150


def chosen_weight(
    found: nesy.MAP, traced: Trace, every: dict[tuple[Any, ...], float], row: int
) -> float:
    """The weight of the assignment, which must be one of the branches."""
    for number, path in enumerate(traced.paths):
        values = []
        for name in path.names:
            given = found.assignment[name]
            given = given[row] if traced.batch is not None else given
            values.append(given.item() if isinstance(given, torch.Tensor) else given)
        if (number, *values) in every:
            return every[(number, *values)]
    raise AssertionError("the assignment is no branch of the program")


def test_samples_of_random_programs() -> None:
    tested = 0
    for seed in range(1, 200):
        script = Script(seed, most=3, branches=False)
        program = script.program().double()
        traced = program._traced()
        if traced.batch is None or tested == 20:
            continue
        every = branches(program, traced, 0)
        if len(every) < 2:
            continue
        names = traced.paths[0].names
        drawn = program.sample(4000, torch.Generator().manual_seed(seed))
        columns = [np.asarray(drawn[name])[:, 0].tolist() for name in names]
        check_frequencies(every, list(zip(*columns, strict=True)), seed)
        tested += 1
    assert tested == 20


def check_frequencies(
    every: dict[tuple[Any, ...], float], drawn: list[tuple[Any, ...]], seed: int
) -> None:
    values = list(every)
    expected = torch.tensor([every[v] for v in values], dtype=torch.float64).softmax(0) * len(drawn)
    counts = torch.tensor([float(drawn.count(v[1:])) for v in values])
    assert counts.sum() == len(drawn), seed
    frequent = expected >= 5
    observed = [*counts[frequent].tolist(), counts[~frequent].sum().item()]
    wanted = [*expected[frequent].tolist(), expected[~frequent].sum().item()]
    pairs = [(o, e) for o, e in zip(observed, wanted, strict=True) if e > 1]
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    freedom = len(pairs) - 1
    if freedom >= 1:
        limit = QUANTILES.get(freedom, freedom + 4.4 * math.sqrt(2 * freedom))
        assert statistic < limit, (seed, observed, wanted)


@nesy.do
def branching() -> Generator[Any, Any, Any]:
    a = yield nesy.choice({"left": 0.25, "right": 0.75})
    if a == "left":
        return (yield nesy.uniform([1, 2])) == 1
    return (yield nesy.uniform([3, 4, 5])) > 3


def test_samples_across_paths() -> None:
    """P(left | true) = 0.125 / 0.625; the other path's draw is missing."""
    drawn = branching().sample(20_000, torch.Generator().manual_seed(0))
    left = np.asarray(drawn["choice[0]"]) == "left"
    assert abs(left.mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 20_000)
    second = drawn["choice[1]"]
    assert isinstance(second, torch.Tensor)
    assert set(second[torch.from_numpy(left)].tolist()) == {1}
    assert set(second[torch.from_numpy(~left)].tolist()) == {4, 5}
    again = branching().sample(20_000, torch.Generator().manual_seed(0))
    assert np.array_equal(left, np.asarray(again["choice[0]"]) == "left")


def test_explanations_without_mass_and_of_other_values() -> None:
    n = torch.tensor([3, 40])
    die = nesy.uniform(range(1, 7))

    @nesy.do
    def total() -> Generator[Any, Any, Any]:
        first, second = (yield die), (yield die)
        yield nesy.guard(first + second == nesy.observed(n))
        return first * 10 + second

    found = total().map()
    assert found.log_weight.exp().tolist() == pytest.approx([1 / 36, 0])
    assert [v[1].item() for v in found.assignment.values()] == [-1, -1]
    assert found.value[0] in (12, 21)
    assert found.value[1] is None
    law = total().distribution()
    shares = dict(zip(law.support, law.log_prob[0].exp().tolist(), strict=True))
    assert shares[12] == pytest.approx(0.5)
    assert shares[21] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        total().sample(0)
