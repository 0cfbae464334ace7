"""The check that a missing barrier is noticed, on programs that pretend."""

from __future__ import annotations

import json
from pathlib import Path

import check_barriers
import pytest
from check_barriers import Barrier
from rich.console import Console

KERNEL = """// __syncthreads() of a comment
void kernel() {
  __syncthreads();
  if (warp == 0) __syncwarp();  // after __syncthreads()
}
"""
#: What a program does without each line of its source.
PROGRAM = """#!/bin/sh
echo run >> "$0.runs"
case "$SAPWOOD_REMOVED_BARRIER" in
  splat2d/a.cuh:1) echo "SUMMARY: ThreadSanitizer: data race a.cuh:2 in kernel" >&2; exit 66 ;;
  splat2d/a.cuh:2) echo "FAILED image"; exit 1 ;;
  splat2d/a.cuh:3) kill -SEGV $$ ;;
  splat2d/a.cuh:4) exec sleep 30 ;;
  splat2d/a.cuh:5) echo "the removed barrier was reached" >&2 ;;
esac
"""


def pretender(folder: Path, text: str = PROGRAM) -> Path:
    program = folder / "test_splat2d_device"
    program.write_text(text)
    program.chmod(0o755)
    return program


def places(count: int) -> list[Barrier]:
    return [
        Barrier("splat2d", f"splat2d/a.cuh:{i}", "__syncthreads();") for i in range(1, count + 1)
    ]


def test_every_barrier_of_the_kernels_is_known() -> None:
    found = check_barriers.barriers_of(check_barriers.ROOT / "csrc")
    assert {b.family for b in found} == set(check_barriers.PROGRAMS)
    assert all(b.text.split("//")[0].count("__sync") == 1 for b in found)
    text = "".join(p.read_text() for p in (check_barriers.ROOT / "csrc").rglob("*.cuh"))
    assert len(found) == text.count("__syncthreads();") + text.count("__syncwarp();")


def test_comments_are_no_barriers(tmp_path: Path) -> None:
    (tmp_path / "splat2d").mkdir()
    (tmp_path / "splat2d" / "a.cuh").write_text(KERNEL)
    found = check_barriers.barriers_of(tmp_path)
    assert [b.place for b in found] == ["splat2d/a.cuh:3", "splat2d/a.cuh:4"]


@pytest.mark.parametrize("line", ["__syncthreads_or(x);", "__syncwarp(); __syncwarp();"])
def test_what_cannot_be_removed_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text(line)
    with pytest.raises(SystemExit, match=r"a\.cuh:1 must hold one of"):
        check_barriers.barriers_of(tmp_path)


@pytest.mark.parametrize(
    ("line", "verdict", "detail"),
    [
        (1, "race", "data race a.cuh:2 in kernel"),
        (2, "wrong", "exit 1: FAILED image"),
        (3, "wrong", "exit -11: no output"),
        (4, "hang", "after 1 s"),
        (5, "survived", "reached"),
        (6, "survived", "never reached"),
    ],
)
def test_verdicts(line: int, verdict: str, detail: str, tmp_path: Path) -> None:
    program = pretender(tmp_path)
    outcome = check_barriers.run(program, f"splat2d/a.cuh:{line}", timeout=1.0)
    assert (outcome.verdict, outcome.detail) == (verdict, detail)


def test_results_of_the_same_program_are_kept(tmp_path: Path) -> None:
    program, results = pretender(tmp_path), tmp_path / "results.json"
    first = check_barriers.check(places(2), tmp_path, results)
    runs = tmp_path / "test_splat2d_device.runs"
    assert runs.read_text().count("run") == 3  # as it is, and without each of two
    assert check_barriers.check(places(2), tmp_path, results) == first
    assert runs.read_text().count("run") == 3
    assert set(json.loads(results.read_text())) == {b.place for b in places(2)}
    pretender(tmp_path, PROGRAM + "# another build\n")
    check_barriers.check(places(3)[2:], tmp_path, results)
    assert runs.read_text().count("run") == 5
    assert set(json.loads(results.read_text())) == {b.place for b in places(3)}
    assert program.is_file()


def test_quickly_only_the_first_of_each_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "tests" / "cpp"
    programs.mkdir(parents=True)
    pretender(programs)
    monkeypatch.setattr(check_barriers, "barriers_of", lambda _: places(6))
    for options, code, runs in ([], 1, 7), (["--quick"], 0, 8), (["--require", "50"], 0, 15):
        monkeypatch.setattr(check_barriers, "TIMEOUT", 1.0)
        monkeypatch.setattr("sys.argv", ["check_barriers", "--build", str(tmp_path), *options])
        assert check_barriers.main() == code
        assert (programs / "test_splat2d_device.runs").read_text().count("run") == runs
    assert "1 of 1 noticed: 100.0 %" in capsys.readouterr().out


def test_a_program_that_fails_as_it_is_shows_nothing(tmp_path: Path) -> None:
    pretender(tmp_path, "#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit, match="test_splat2d_device fails as it is"):
        check_barriers.check(places(1), tmp_path, None)


def test_a_program_must_be_built(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is missing: make barriers builds it"):
        check_barriers.check(places(1), tmp_path, None)


def test_survivors_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretender(tmp_path)
    barriers = [b for b in places(6) if not b.place.endswith(":4")]
    outcomes = check_barriers.check(barriers, tmp_path, None)
    share = check_barriers.report(barriers, outcomes, Console(width=80))
    assert share == pytest.approx(60)
    shown = capsys.readouterr().out
    assert "survived, never reached: splat2d/a.cuh:6  __syncthreads();" in shown
    assert "3 of 5 noticed: 60.0 %" in shown
