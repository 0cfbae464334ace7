"""logsemiring against its peers. Cases and providers: sapwood/cli/benchmarks/logsemiring.py."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Measure

from sapwood.cli.benchmarks.logsemiring import LogsemiringCase, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per case and provider, grouped by case."""
    option = metafunc.config.getoption
    quick, device, dtype = not option("--full"), option("--device"), option("--dtype")
    pairs = [
        pytest.param(case, provider, id=f"{case.op}-{case.name}-{provider}")
        for case in cases(quick=quick, device=device, dtype=dtype)
        for provider in case.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


def test_logsemiring(
    case: LogsemiringCase, provider: str, benchmark: Any, interleaved: Measure
) -> None:
    result = interleaved(case, provider)
    if provider not in result.timings:
        pytest.skip(result.unavailable[provider])
    timing = result.timings[provider]
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info.update(vars(timing), provider=provider, baseline=case.baseline)
    benchmark.pedantic(case.build(provider), rounds=5, iterations=10, warmup_rounds=1)
    assert timing.median_us > 0
