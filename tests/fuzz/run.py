"""Fuzzes the readers of files: ``python -m tests.fuzz.run --reader mask_file --executions 100000``.

Each reader runs in a process of its own under Atheris. A reader must accept a file or refuse it
with its documented error, within a second and with memory in proportion to the file; whatever else
happens is a finding, its input is kept, and the command fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz.readers import READERS

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.2  # seconds


def fuzz(
    reader: str, executions: int, seed: int, keep: Path, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The tally of one reader; where it is interrupted, that of what was done."""
    task = progress.add_task(reader, total=executions)
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "tally.json", Path(folder) / "log"
        command = (sys.executable, "-m", "tests.fuzz.worker", "--reader", reader)
        options = ("--executions", str(executions), "--seed", str(seed), "--keep", str(keep))
        with log.open("wb") as out:
            worker = subprocess.Popen(
                (*command, *options, "--tally", str(path)), cwd=ROOT, stdout=out, stderr=out
            )
            try:
                while worker.poll() is None:
                    time.sleep(_POLL)
                    progress.update(task, completed=_read(path, reader)["executions"])
            except KeyboardInterrupt:
                yield _read(path, reader)
                raise
            finally:
                worker.kill()
                worker.wait()
        tally = _read(path, reader)
        if worker.returncode != 0:
            (keep / f"{reader}.log").write_bytes(log.read_bytes())
            tally["findings"]["the process ended"] = f"{reader}.log"
    progress.update(task, completed=tally["executions"])
    yield tally


def _read(path: Path, reader: str) -> dict[str, Any]:
    if not path.exists():
        return {"reader": reader, "executions": 0, "accepted": 0, "refused": 0, "findings": {}} | {
            "seconds": 0.0
        }
    tally: dict[str, Any] = json.loads(path.read_text())
    return tally


def summary(tallies: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="")
    table.add_column("reader", no_wrap=True)
    for title in ("executions", "accepted", "refused", "findings", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for tally in tallies:
        counts = (tally["executions"], tally["accepted"], tally["refused"], len(tally["findings"]))
        table.add_row(tally["reader"], *(f"{n:,}" for n in counts), f"{tally['seconds']:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--reader",
        choices=list(READERS),
        nargs="+",
        default=list(READERS),
        metavar="NAME",
        help=f"which (all): {', '.join(READERS)}",
    )
    add("--executions", type=int, default=10_000, help="files per reader (10000)")
    add("--seed", type=int, default=0, help="of the mutations (0)")
    add("--keep", type=Path, default=Path("build/fuzz"), help="folder of findings (build/fuzz)")
    add("--json", action="store_true", help="the tallies as JSON on the standard output")
    chosen = parser.parse_args()
    if chosen.executions < 1:
        parser.error(f"--executions must be at least 1, got {chosen.executions}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris must be installed: pip install 'sapwood[fuzz]'")
    console = Console(stderr=chosen.json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tallies: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        keep = chosen.keep.resolve()
        try:
            for name in chosen.reader:
                for tally in fuzz(name, chosen.executions, chosen.seed, keep, progress):
                    tallies.append(tally)
        except KeyboardInterrupt:
            console.print("interrupted: these are the files read so far")
    if chosen.json:
        print(json.dumps(tallies, indent=1))
    else:
        console.print(summary(tallies))
    found = [(t["reader"], *item) for t in tallies for item in t["findings"].items()]
    for reader, what, name in found:
        console.print(f"{reader}: {what}, kept as {chosen.keep / name}", markup=False)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
