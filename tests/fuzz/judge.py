"""Runs a reader on one file and judges what it does."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.readers import Reader

MEMORY_PER_BYTE, MEMORY = 10, 48 << 20  # how much more than the file a reader may touch
ADDRESS_SPACE = 4 << 30  # what the process may reserve beyond what it has


class TooSlow(BaseException):
    """Raised inside a reader; no handler of exceptions catches it."""


@dataclass
class Tally:
    """What became of the files."""

    reader: str
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)  # what happened -> the file kept

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Judge:
    """One reader in a folder of its own.

    Args:
        reader: what to run.
        folder: for the fuzzed file and those beside it.
        keep: where inputs are kept that a reader does not refuse as it should.
    """

    def __init__(self, reader: Reader, folder: Path, keep: Path) -> None:
        self.reader, self.keep = reader, keep
        self.tally = Tally(reader.name)
        if reader.prepare is not None:
            reader.prepare(folder)
        self._path = folder / reader.file
        self._began = 0.0

    def __call__(self, content: bytes) -> None:
        """Reads one file and counts it."""
        self._path.unlink(missing_ok=True)  # an earlier one may still be mapped into memory
        self._path.write_bytes(content)
        tally, before = self.tally, _peak()
        self._began = self._began or time.monotonic()
        tally.executions += 1
        try:
            with _time_limit(self.reader.seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.read(self._path)
            tally.accepted += 1
        except self.reader.errors:
            tally.refused += 1
        except (Exception, TooSlow) as error:
            self._note(_named(error), content)
        grown = _peak() - before
        if grown > MEMORY + MEMORY_PER_BYTE * len(content) + self.reader.largest:
            self._note("too much memory", content)
        tally.seconds = time.monotonic() - self._began

    def _note(self, what: str, content: bytes) -> None:
        if what in self.tally.findings:
            return
        name = f"{self.reader.name}-{hashlib.sha256(content).hexdigest()[:12]}"
        self.keep.mkdir(parents=True, exist_ok=True)
        (self.keep / name).write_bytes(content)
        self.tally.findings[what] = name


def limit_memory() -> None:
    """Makes absurd allocations fail in this process instead of taking the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _named(error: BaseException) -> str:
    """Type and place of an error, so that each kind is kept once."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "sapwood" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__} at {where}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
