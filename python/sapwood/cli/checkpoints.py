"""The folder from which an interrupted ``sapwood prune`` goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood._files import atomic_write_text

REPORT = "report.json"
_RUN = "run.json"

Setup = dict[str, Any]  # option without dashes -> value: all that decides the outcome of a run


@dataclass(frozen=True)
class Place:
    """The checkpoint of a run whose results go to ``out``."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out / "checkpoint"

    @property
    def holds_steps(self) -> bool:
        """Whether something was trained that can go on."""
        return any(self.folder.glob("*.safetensors"))

    def finished(self, setup: Setup) -> dict[str, Any] | None:
        """The report of this run when it is over; None when there is something to do.

        Raises:
            ValueError: when the folder holds the results of another run and nothing to go on with.
        """
        if (self.folder / _RUN).exists() or not (self.out / REPORT).exists():
            return None
        report = _read(self.out / REPORT)
        _require_same(report.get("setup"), setup, f"{self.out} holds a finished run")
        return report

    def open(self, setup: Setup, *, resume: bool) -> bool:
        """Makes the folder ready; returns whether there is a run to go on with.

        Raises:
            ValueError: when it holds a run and ``resume`` is not set, or another run.
        """
        path = self.folder / _RUN
        if self.holds_steps and not resume:
            raise ValueError(
                f"{self.out} holds an interrupted run: --resume goes on with it; "
                f"remove {self.folder} to begin anew"
            )
        if self.holds_steps:
            _require_same(_read(path), setup, f"{self.out} holds an interrupted run")
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(setup, indent=1) + "\n")
        return False

    def remove(self) -> None:
        """Removes it, and ``out`` too when nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        content = None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON object, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object")
    return content


def _require_same(there: object, setup: Setup, what: str) -> None:
    there = there if isinstance(there, dict) else {}
    for key, value in setup.items():
        if there.get(key) != value:
            raise ValueError(f"{what} with --{key} {there.get(key)}, got {value}")
