"""``sapwood prune``: train and prune one network, save it with its masks and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sapwood.cli import console


class Task(str, Enum):
    """What can be learnt."""

    digits = "digits"
    mnist = "mnist"


class Method(str, Enum):
    """How weights are switched off."""

    progressive = "progressive"
    cubic = "cubic"
    one_shot = "one-shot"
    dense = "dense"


class Scope(str, Enum):
    """Over what the weights are ranked."""

    everything = "global"
    layer = "layer"
    erk = "erk"


def prune(
    task: Annotated[
        Task | None, typer.Option(help="Default: mnist with --data, else digits.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the four MNIST idx files.")] = None,
    method: Annotated[
        Method, typer.Option(help="progressive: linear schedule; one-shot: cut, then fine-tune.")
    ] = Method.progressive,
    sparsity: Annotated[float, typer.Option(help="Share of weights to switch off.")] = 0.9,
    scope: Annotated[Scope, typer.Option(help="Where weights compete.")] = Scope.everything,
    t1: Annotated[float, typer.Option(help="Part of training after which masks are fixed.")] = 0.75,
    every: Annotated[int | None, typer.Option(help="Steps between cuts.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    finetune_epochs: Annotated[
        int, typer.Option(help="With one-shot: passes after the cut.", min=0)
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and order of the data.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("sapwood-prune"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train and prune one network, save it, pack it and time it."""
    task = task or (Task.mnist if data is not None else Task.digits)
    _check_arguments(task, data, method, sparsity, t1)
    console.require_ops()
    import torch

    from sapwood.cli import experiment

    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    with _reported(out):
        dataset = experiment.read(task.value, data)
        request = experiment.Request(
            task=task.value,
            method=method.value,
            sparsity=0.0 if method is Method.dense else sparsity,
            scope=scope.value,
            t1=t1,
            every=every,
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            seed=seed,
        )
        with console.bars() as bars:
            outcome = experiment.execute(request, dataset, bars)
        files = experiment.save(out, outcome)
    if as_json:
        console.print_json(outcome.report)
        return
    experiment.show(outcome)
    line = f"wrote {', '.join(files)} to {out} ({time.perf_counter() - start:.0f} s)"
    console.stdout().print(line, markup=False, soft_wrap=True)


def _check_arguments(
    task: Task, data: Path | None, method: Method, sparsity: float, t1: float
) -> None:
    if task is Task.mnist and data is None:
        raise typer.BadParameter("--task mnist needs --data DIR, the folder of its idx files")
    if task is Task.digits and data is not None:
        raise typer.BadParameter("--task digits takes no --data: scikit-learn brings the digits")
    if method is not Method.dense and not 0 < sparsity < 1:
        raise typer.BadParameter(f"--sparsity must lie between 0 and 1, got {sparsity}")
    if not 0 < t1 <= 1:
        raise typer.BadParameter(f"--t1 must lie in (0, 1], got {t1}")
    if task is Task.digits:
        console.require("prune --task digits", {"sklearn": "scikit-learn"})


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Turns what can go wrong on the way into one line and an exit code."""
    from sapwood.data import MissingDataError

    try:
        yield
    except KeyboardInterrupt:
        console.fail("interrupted; nothing was written", console.INTERRUPTED)
    except MissingDataError as error:
        console.fail(str(error), console.MISSING_DATA)
    except ValueError as error:
        console.fail(str(error), console.BAD_ARGUMENTS)
    except OSError as error:
        path = error.filename or out
        console.fail(f"{path}: {error.strerror or error}", console.BAD_ARGUMENTS)
