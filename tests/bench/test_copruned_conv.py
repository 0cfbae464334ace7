"""The benchmark's providers compute what they are timed for, and a wrong one gets no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sapwood.cli.benchmarks.copruned_conv import PROVIDERS, ConvCase, cases
from sapwood.cli.benchmarks.runner import WrongResult, run_case

PAIRS = [(op, provider) for op, (_, providers) in PROVIDERS.items() for provider in providers]


def small(op: str) -> ConvCase:
    channels = 64 if op == "copruned_depthwise_conv2d" else 16
    return ConvCase(op, 2, channels, 64, 12, 3, 0.5, tile=4)


@pytest.mark.parametrize(("op", "provider"), PAIRS)
def test_provider(op: str, provider: str) -> None:
    case = small(op)
    case.check(provider, case.build(provider)())
    if op in ("copruned_conv2d", "copruned_conv2d_backward"):
        joint = replace(case, filters_kept=0.5)
        joint.check(provider, joint.build(provider)())


def wrong(right: Any) -> Any:
    if isinstance(right, tuple):
        return (right[0] + 1, *right[1:])
    return right * 1.001


@pytest.mark.parametrize("op", PROVIDERS)
def test_wrong_results_get_no_time(op: str) -> None:
    case = small(op)
    with pytest.raises(WrongResult, match=f"{op} .*: sapwood is off by"):
        case.check("sapwood", wrong(case.build("sapwood")()))


def test_dense_gradients_are_checked_where_nothing_is_cut() -> None:
    case = replace(small("copruned_conv2d_backward"), keep=1.0)
    for provider in case.providers:
        right = case.build(provider)()
        case.check(provider, right)
        with pytest.raises(WrongResult):
            case.check(provider, wrong(right))


def test_cases_are_timed_against_their_baseline() -> None:
    result = run_case(small("copruned_conv2d"), ("sapwood",), rounds=1, seconds=0)
    assert set(result.timings) == {"channels_last", "sapwood"}
    names = [(case.op, case.name) for case in cases(quick=False)]
    assert len(names) == len(set(names))
    assert {op for op, _ in names} == set(PROVIDERS)
    assert all(torch.finfo(getattr(torch, case.dtype)) for case in cases(quick=True))
