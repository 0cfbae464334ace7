"""What every command shares: where it prints, how it fails, how it shows progress."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sapwood.cli.choices import Task

BAD_ARGUMENTS = 2
MISSING_DATA = 3
INTERRUPTED = 130  # 128 + SIGINT, what shells expect


def stdout() -> Console:
    """The console for results. Made per call: tests and pipes replace ``sys.stdout``."""
    return Console(highlight=False)


def stderr() -> Console:
    """The console for progress and errors, so that ``--json`` output stays clean."""
    return Console(stderr=True, highlight=False)


def fail(message: str, code: int) -> NoReturn:
    """Prints one line to stderr and ends with an exit code."""
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def require(command: str, packages: dict[str, str]) -> None:
    """Ends with one line when a package of the extra ``tour`` is missing.

    ``packages`` maps import names to the names that pip knows.
    """
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        fail(f"sapwood {command} needs {names}: pip install 'sapwood[tour]'", code=1)


def require_ops() -> None:
    """Ends with the reason and the next step when the compiled library is unusable."""
    from sapwood import _load

    if _load.ops_error is not None:
        fail(f"{_load.ops_error}; 'python -m sapwood' shows the whole installation", code=1)


def check_task(command: str, task: Task, data: Path | None, t1: float) -> None:
    """What the commands that train have in common: data where they are needed, and ``--t1``."""
    if task is not Task.digits and data is None:
        files = "idx files" if task is Task.mnist else "files"
        raise typer.BadParameter(f"--task {task.value} needs --data DIR, the folder of its {files}")
    if task is Task.digits and data is not None:
        raise typer.BadParameter("--task digits takes no --data: scikit-learn brings the digits")
    if not 0 < t1 <= 1:
        raise typer.BadParameter(f"--t1 must lie in (0, 1], got {t1}")
    if task is Task.digits:
        require(f"{command} --task digits", {"sklearn": "scikit-learn"})


def command_line(context: typer.Context, *extra: str) -> str:
    """The command as it was typed, for a shell, with further options at its end."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        source, option = context.get_parameter_source(name), parameter.opts[0]
        if source is None or source.name != "COMMANDLINE" or option in extra:
            continue
        text = str(value.value if isinstance(value, Enum) else value)
        words += [option] if value is True else [option, text]
    return shlex.join([*words, *extra])


@contextmanager
def reported(out: Path) -> Iterator[None]:
    """Turns the errors of reading, training and writing into one line and an exit code."""
    from sapwood.data import MissingDataError

    try:
        yield
    except MissingDataError as error:
        fail(str(error), MISSING_DATA)
    except (ValueError, ArithmeticError) as error:
        fail(str(error), BAD_ARGUMENTS)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}", BAD_ARGUMENTS)


def print_json(data: Any) -> None:
    """Prints data to stdout as JSON and nothing else."""
    typer.echo(json.dumps(data, indent=2))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are figures, aligned right."""
    result = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left", header_style="dim")
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


class Bars:
    """Progress bars of training runs; silent where stderr is not a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def start(self, name: str) -> None:
        """Begins a bar for the next run; its length comes with the first step."""
        self._task = self._progress.add_task(name, total=None, note="")

    def step(self, done: int, total: int, note: str, name: str | None = None) -> None:
        """Moves the present bar; ``note`` stands behind it, ``name`` before it from now on."""
        self._progress.update(self._task, completed=done, total=total, note=note, description=name)

    def say(self, text: str) -> None:
        """Prints a line above the bars, to stderr; also where there are no bars."""
        self._progress.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def bars() -> Iterator[Bars]:
    """Shows progress bars while the block runs."""
    console = stderr()
    with Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield Bars(progress)
