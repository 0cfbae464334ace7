"""The record of all measurements, bench/history.csv: append-only, one row per measured provider.

``ratio`` is the median over interleaved rounds of time / time of the baseline; below 1 is faster.
The baseline is dense torch with the weight multiplied beforehand; ``F.linear(x, weight * mask)`` in
the training step (op masked_matmul); torch's ``to_sparse_csr`` in packing (op pack_sparse).
"""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from sapwood._measure import machine_name
from sapwood.cli.benchmarks.runner import Case, Timing

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("history.csv")
COLUMNS = (
    *("date", "commit", "machine", "torch", "op", "case", "provider", "dtype"),
    *("median_us", "ratio", "peak_mb"),
)
KEY = ("commit", "machine", "op", "case", "provider", "dtype")
#: What changes a measurement; other edits do not make a commit "dirty".
_MEASURED = ("CMakeLists.txt", "csrc", "cmake", "python", "triton_kernels")

Row = dict[str, str]


def commit() -> str:
    """Short id of the checked-out commit; "-dirty" when measured files differ from it."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *_MEASURED)
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def row(case: Case, provider: str, timing: Timing, peak_mb: float | None) -> Row:
    """The row of one provider, measured now, here."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": machine_name(case.device),
        "torch": torch.__version__,
        "op": case.op,
        "case": case.name,
        "provider": provider,
        "dtype": case.dtype,
        "median_us": f"{timing.median_us:.2f}",
        "ratio": f"{timing.ratio:.4f}",
        "peak_mb": "" if peak_mb is None else f"{peak_mb:.1f}",
    }


def read(file: Path = FILE) -> list[Row]:
    """All rows.

    Raises:
        ValueError: when the columns are not ours or a key occurs twice.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file.name}: columns must be {COLUMNS}, got {reader.fieldnames}")
        rows = list(reader)
    keys = [key(r) for r in rows]
    if len(set(keys)) != len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"{file.name}: the key {twice} occurs more than once")
    return rows


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def append(rows: Iterable[Row], file: Path = FILE) -> int:
    """Adds the rows whose key is new, and returns their number."""
    known = {key(r) for r in read(file)}
    fresh = {key(r): r for r in rows if key(r) not in known}
    with file.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, COLUMNS, lineterminator="\n").writerows(fresh.values())
    return len(fresh)
