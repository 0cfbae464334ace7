"""Removes every barrier of the CUDA kernels, one at a time, and sees whether that is noticed.

    make barriers                                      # builds the programs in build/tsan
    python tools/check_barriers.py --only splat2d      # runs them again, once per barrier

The programs of tests/cpp drive the kernels through the emulation under ThreadSanitizer. They are
compiled with tests/cpp/removable_barriers.h, so that SAPWOOD_REMOVED_BARRIER=file:line leaves one
barrier out at run time. A removal is noticed where ThreadSanitizer reports a race, where a result
is wrong (an index that was never written may end in a crash), or where the program hangs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
#: Of each family, the program that drives its kernels.
PROGRAMS = {
    "copruned_conv": "test_copruned_conv_device",
    "logsemiring": "test_logsemiring_device",
    "masked_matmul": "test_device_kernels",
    "similarity": "test_similarity_device",
    "splat2d": "test_splat2d_device",
}
SOURCES = ("*.cu", "*.cuh", "*.inl")
BARRIER = re.compile(r"\b__sync\w*")
REMOVABLE = ("__syncthreads", "__syncwarp")
VERDICTS = ("race", "wrong", "hang", "survived")
RACE = re.compile(r"^SUMMARY: ThreadSanitizer: (data race .*)$", re.MULTILINE)
REACHED = "the removed barrier was reached"
TIMEOUT = 300.0  # seconds; a whole program takes a few


@dataclass(frozen=True)
class Barrier:
    """One line of a source: ``masked_matmul/cuda_csr.cuh:70``."""

    family: str
    place: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What one removal led to, and in which build of the program."""

    verdict: str
    detail: str
    seconds: float
    program: str


def barriers_of(csrc: Path) -> list[Barrier]:
    """Every barrier of the kernels in the order of the sources, comments left out."""
    found: list[Barrier] = []
    for path in sorted(p for pattern in SOURCES for p in csrc.rglob(pattern)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            names = BARRIER.findall(line.split("//")[0])
            place = f"{path.relative_to(csrc).as_posix()}:{number}"
            if len(names) > 1 or not set(names) <= set(REMOVABLE):
                raise SystemExit(f"check_barriers: {place} must hold one of {REMOVABLE}")
            if names:
                found.append(Barrier(path.relative_to(csrc).parts[0], place, line.strip()))
    return found


def run(program: Path, place: str | None, timeout: float | None = None) -> Outcome:
    """One run without the barrier at ``place``; ``None`` leaves all of them in."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    environment.pop("SAPWOOD_REMOVED_BARRIER", None)
    if place is not None:
        environment["SAPWOOD_REMOVED_BARRIER"] = place
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    limit = TIMEOUT if timeout is None else timeout
    start = time.monotonic()
    try:
        done = subprocess.run(
            [program], env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome("hang", f"after {limit:.0f} s", limit, digest)
    seconds = time.monotonic() - start
    race = RACE.search(done.stderr)
    if race is not None:
        return Outcome("race", race[1][:200], seconds, digest)
    if done.returncode != 0:
        failed = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        return Outcome("wrong", f"exit {done.returncode}: {failed[0][:200]}", seconds, digest)
    reached = "reached" if REACHED in done.stderr else "never reached"
    return Outcome("survived", reached, seconds, digest)


def load(path: Path | None) -> dict[str, Outcome]:
    """Results of an earlier run, by place."""
    if path is None or not path.is_file():
        return {}
    return {place: Outcome(**known) for place, known in json.loads(path.read_text()).items()}


def save(path: Path | None, outcomes: dict[str, Outcome]) -> None:
    if path is None:
        return
    written = path.with_name(path.name + ".part")
    text = json.dumps({place: asdict(o) for place, o in outcomes.items()}, indent=2)
    written.write_text(text + "\n")
    written.replace(path)


def check(
    barriers: list[Barrier], programs: Path, results: Path | None, with_all: bool = True
) -> dict[str, Outcome]:
    """Removes each barrier in turn; what ``results`` knows of the same program is not run again.

    ``with_all`` first runs a program with all its barriers, which must succeed.
    """
    known, outcomes = load(results), {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("barriers", total=len(barriers))
        for family in sorted({b.family for b in barriers}):
            program = programs / PROGRAMS[family]
            if not program.is_file():
                raise SystemExit(f"check_barriers: {program} is missing: make barriers builds it")
            digest = hashlib.sha256(program.read_bytes()).hexdigest()
            tried = not with_all
            for barrier in (b for b in barriers if b.family == family):
                progress.update(task, description=barrier.place)
                before = known.get(barrier.place)
                if before is not None and before.program == digest:
                    outcomes[barrier.place] = before
                else:
                    if not tried and (found := run(program, None)).verdict != "survived":
                        raise SystemExit(f"check_barriers: {program.name} fails as it is: {found}")
                    tried = True
                    outcomes[barrier.place] = run(program, barrier.place)
                    save(results, {**known, **outcomes})
                progress.advance(task)
    return outcomes


def report(barriers: list[Barrier], outcomes: dict[str, Outcome], console: Console) -> float:
    """Prints a row per family and every survivor; returns the percentage that was noticed."""
    table = Table("family", "barriers", *VERDICTS)
    for column in table.columns[1:]:
        column.justify = "right"
    families = sorted({b.family for b in barriers})
    for family in [*families, "all"]:
        mine = [outcomes[b.place].verdict for b in barriers if family in (b.family, "all")]
        table.add_row(family, str(len(mine)), *(str(mine.count(v)) for v in VERDICTS))
    console.print(table)
    survivors = [b for b in barriers if outcomes[b.place].verdict == "survived"]
    for b in survivors:
        console.print(f"survived, {outcomes[b.place].detail}: {b.place}  {b.text}", markup=False)
    share = 100 * (1 - len(survivors) / len(barriers))
    console.print(f"{len(barriers) - len(survivors)} of {len(barriers)} noticed: {share:.1f} %")
    return share


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "tsan", help="build folder")
    parser.add_argument("--only", choices=sorted(PROGRAMS), help="one family")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first barrier of each family; the programs are known to succeed with all",
    )
    parser.add_argument("--json", type=Path, help="results; those of the same build are kept")
    parser.add_argument("--require", type=float, default=95.0, help="percent that must be noticed")
    arguments = parser.parse_args()
    barriers = barriers_of(ROOT / "csrc")
    missing = {b.family for b in barriers} - set(PROGRAMS)
    if missing:
        raise SystemExit(f"check_barriers: no program drives the kernels of {sorted(missing)}")
    barriers = [b for b in barriers if arguments.only in (None, b.family)]
    if arguments.quick:
        barriers = list({b.family: b for b in reversed(barriers)}.values())
    programs = arguments.build / "tests" / "cpp"
    outcomes = check(barriers, programs, arguments.json, with_all=not arguments.quick)
    return 0 if report(barriers, outcomes, Console()) >= arguments.require else 1


if __name__ == "__main__":
    sys.exit(main())
