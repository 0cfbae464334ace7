"""splat2d against its peers. Cases and providers: sapwood/cli/benchmarks/splat2d.py."""

from __future__ import annotations

from conftest import Compare

from sapwood.cli.benchmarks.splat2d import Splat2dCase, cases

CASES = cases


def test_splat2d(case: Splat2dCase, provider: str, compare: Compare) -> None:
    compare(case, provider)
