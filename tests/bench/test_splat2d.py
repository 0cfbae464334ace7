"""The benchmark's providers compute what they are timed for, and a wrong one gets no time."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.cli.benchmarks.runner import WrongResult, run_case
from sapwood.cli.benchmarks.splat2d import OPS, Splat2dCase, cases

CASES = {op: Splat2dCase(op, 40, 50, 60) for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_providers(op: str) -> None:
    case = CASES[op]
    for provider in case.providers:
        case.check(provider, case.build(provider)())


@pytest.mark.parametrize("op", OPS)
def test_wrong_results_get_no_time(op: str) -> None:
    case = CASES[op]
    right: Any = case.build("sapwood")()
    case.check("sapwood", right)
    wrong = (right[0], right[1], right[2] * 1.001) if isinstance(right, tuple) else right + 1
    with pytest.raises(WrongResult, match=f"{op} 40x50 N=60: sapwood is off by"):
        case.check("sapwood", wrong)


def test_cases_are_timed_against_their_baseline() -> None:
    result = run_case(CASES["splat2d"], ("sapwood",), rounds=1, seconds=0)
    assert set(result.timings) == {"dense", "sapwood"}
    names = [(case.op, case.name) for case in cases(quick=False)]
    assert len(names) == len(set(names))
    assert {op for op, _ in names} == set(OPS)
