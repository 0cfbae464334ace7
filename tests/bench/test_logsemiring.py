"""The benchmark cases of logsemiring: every provider computes what it is timed for."""

from __future__ import annotations

import importlib

import pytest
import torch

from sapwood.cli.benchmarks.logsemiring import PROVIDERS, LogsemiringCase, cases
from sapwood.cli.benchmarks.runner import Unavailable, WrongResult

PAIRS = [(op, provider) for op, (_, providers) in PROVIDERS.items() for provider in providers]


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(("op", "provider"), PAIRS, ids=[f"{o}-{p}" for o, p in PAIRS])
def test_provider_is_correct(op: str, provider: str) -> None:
    case = LogsemiringCase(op, 2, 12, 5, 5) if not op.startswith("segment") else None
    case = case or LogsemiringCase(op, 1, 90, 1, 7)
    if provider == "torch_semiring_einsum" and not importable(provider):
        with pytest.raises(Unavailable, match="is not installed"):
            case.build(provider)
        return
    case.check(provider, case.build(provider)())


@pytest.mark.parametrize("op", PROVIDERS)
def test_the_check_can_fail(op: str) -> None:
    case = LogsemiringCase(op, 1, 12, 3, 3)
    result = case.build(case.baseline)()
    first, *rest = result if isinstance(result, tuple) else (result,)
    spoiled = torch.as_tensor(first) + 5
    with pytest.raises(WrongResult):
        case.check(case.baseline, (spoiled, *rest))


def test_the_uncertified_trick_is_caught_where_it_is_wrong() -> None:
    case = LogsemiringCase("log_matmul", 1, 32, 32, 32, scale=100.0)
    with pytest.raises(WrongResult):
        case.check("uncertified", case.build("uncertified")())
    case.check("sapwood", case.build("sapwood")())


def test_sweeps_cover_every_op() -> None:
    quick, full = list(cases(quick=True)), list(cases(quick=False))
    assert {c.op for c in quick} == {c.op for c in full} == set(PROVIDERS)
    assert len(set(full)) == len(full)
