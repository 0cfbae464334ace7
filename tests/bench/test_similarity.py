"""The benchmark's providers compute what they are timed for, and a wrong one gets no time."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from sapwood.cli.benchmarks.runner import Unavailable, WrongResult, run_case
from sapwood.cli.benchmarks.similarity import PROVIDERS, SimilarityCase, cases

PAIRS = [(op, provider) for op, (_, providers) in PROVIDERS.items() for provider in providers]


@pytest.mark.parametrize(("op", "provider"), PAIRS)
def test_provider(op: str, provider: str) -> None:
    case = SimilarityCase(op, 120, 16)
    if provider == "faiss" and importlib.util.find_spec("faiss") is None:
        with pytest.raises(Unavailable, match="faiss is not installed"):
            case.build(provider)()
        return
    case.check(provider, case.build(provider)())


def wrong(op: str, right: Any) -> Any:
    if op == "similarity_matrix":
        return right + 1e-3
    if op == "similarity_pairs":
        return tuple(t[:-1] for t in right)  # a pair is missing
    if op == "similarity_topk":
        return right[0] * 0.99, right[1]
    return torch.zeros_like(right)


@pytest.mark.parametrize("op", PROVIDERS)
def test_wrong_results_get_no_time(op: str) -> None:
    case = SimilarityCase(op, 120, 16)
    right = case.build("sapwood")()
    case.check("sapwood", right)
    with pytest.raises(WrongResult, match=f"{op} 120x16: sapwood is off by"):
        case.check("sapwood", wrong(op, right))


def test_cases_are_timed_against_their_baseline() -> None:
    result = run_case(SimilarityCase("similarity_pairs", 60, 8), ("sapwood",), rounds=1, seconds=0)
    assert set(result.timings) == {"dense", "sapwood"}
    names = [(case.op, case.name) for case in cases(quick=False)]
    assert len(names) == len(set(names))
    assert {op for op, _ in names} == set(PROVIDERS)
