"""logsemiring against its peers. Cases and providers: sapwood/cli/benchmarks/logsemiring.py."""

from __future__ import annotations

from conftest import Compare

from sapwood.cli.benchmarks.logsemiring import LogsemiringCase, cases

CASES = cases


def test_logsemiring(case: LogsemiringCase, provider: str, compare: Compare) -> None:
    compare(case, provider)
