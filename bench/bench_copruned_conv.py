"""copruned_conv against its peers. Cases and providers: sapwood/cli/benchmarks/copruned_conv.py."""

from __future__ import annotations

from conftest import Compare

from sapwood.cli.benchmarks.copruned_conv import ConvCase, cases

CASES = cases


def test_copruned_conv(case: ConvCase, provider: str, compare: Compare) -> None:
    compare(case, provider)
