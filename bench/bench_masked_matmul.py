"""masked_matmul against its peers. Cases and providers: sapwood/cli/benchmarks/masked_matmul.py."""

from __future__ import annotations

from conftest import Compare

from sapwood.cli.benchmarks.masked_matmul import MaskedMatmulCase, cases

CASES = cases


def test_masked_matmul(case: MaskedMatmulCase, provider: str, compare: Compare) -> None:
    compare(case, provider)
