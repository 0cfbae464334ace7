"""A short run of the fuzzer's mutations, without its guidance: the same files every time."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.judge import Judge
from tests.fuzz.mutators import mutate
from tests.fuzz.readers import READERS, Reader

SECONDS = 0.6  # per reader
EXECUTIONS = 400


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_damaged_files_are_refused(reader: Reader, tmp_path: Path) -> None:
    folder, keep = tmp_path / "files", tmp_path / "findings"
    folder.mkdir()
    judge, seeds = Judge(reader, folder, keep), reader.seeds()
    for content in seeds:
        judge(content)
    assert judge.tally.accepted == len(seeds), "an intact file was refused"
    random = Random(0)
    while judge.tally.executions < EXECUTIONS and judge.tally.seconds < SECONDS:
        judge(mutate(random.choice(seeds), random, seeds, reader.repair))
    assert judge.tally.findings == {}
    assert judge.tally.refused > judge.tally.executions // 10


@pytest.mark.parametrize(
    ("error", "what"),
    [(KeyError("a"), "KeyError"), (MemoryError(), "MemoryError"), (AssertionError(), "Assertion")],
    ids=["KeyError", "MemoryError", "AssertionError"],
)
def test_other_errors_are_findings(error: Exception, what: str, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raise error

    judge = Judge(Reader("none", read, list), tmp_path, tmp_path / "findings")
    judge(b"input")
    (found,) = judge.tally.findings.items()
    assert what in found[0]
    assert (tmp_path / "findings" / found[1]).read_bytes() == b"input"


def test_a_hang_is_a_finding(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        while True:
            pass

    judge = Judge(Reader("none", read, list, seconds=0.02), tmp_path, tmp_path / "findings")
    judge(b"input")
    assert "TooSlow" in next(iter(judge.tally.findings))


def test_memory_out_of_proportion_is_a_finding(tmp_path: Path) -> None:
    def read(path: Path) -> int:
        return len(b"\1" * (1 << 30))  # more than this process had so far

    judge = Judge(Reader("none", read, list), tmp_path, tmp_path / "findings")
    judge(b"input")
    assert "too much memory" in judge.tally.findings
