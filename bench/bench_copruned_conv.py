"""copruned_conv against its peers. Cases and providers: sapwood/cli/benchmarks/copruned_conv.py."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Measure

from sapwood.cli.benchmarks.copruned_conv import ConvCase, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per case and provider, grouped by case."""
    option = metafunc.config.getoption
    pairs = [
        pytest.param(case, provider, id=f"{case.op}-{case.name.replace(' ', '-')}-{provider}")
        for case in cases(
            quick=not option("--full"), device=option("--device"), dtype=option("--dtype")
        )
        for provider in case.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


def test_copruned_conv(case: ConvCase, provider: str, benchmark: Any, interleaved: Measure) -> None:
    result = interleaved(case, provider)
    timing = result.timings[provider]
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info.update(vars(timing), provider=provider, baseline=case.baseline)
    seconds = timing.median_us * 1e-6
    iterations = max(1, min(1000, int(1e-4 / seconds)))
    benchmark.pedantic(case.build(provider), rounds=5, iterations=iterations, warmup_rounds=1)
    assert timing.median_us > 0
