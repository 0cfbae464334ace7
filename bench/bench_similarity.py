"""similarity against its peers. Cases and providers: sapwood/cli/benchmarks/similarity.py."""

from __future__ import annotations

from conftest import Compare

from sapwood.cli.benchmarks.similarity import SimilarityCase, cases

CASES = cases


def test_similarity(case: SimilarityCase, provider: str, compare: Compare) -> None:
    compare(case, provider)
