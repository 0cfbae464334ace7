"""``sapwood prune``: train and prune one network, save it with its masks and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapwood.cli import console
from sapwood.cli.choices import METHOD_HELP, METHODS, Arch, Method, Scope, Task

if TYPE_CHECKING:
    from sapwood.cli.checkpoints import Place
    from sapwood.cli.experiment import Outcome, Request
    from sapwood.data import Dataset

EPILOG = METHOD_HELP


def prune(
    context: typer.Context,
    task: Annotated[
        Task | None, typer.Option(help="Default: mnist with --data, else digits.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of MNIST's or CIFAR-10's files.")
    ] = None,
    arch: Annotated[
        Arch | None,
        typer.Option(metavar="ARCH", help="mlp, lenet300, smallcnn or resnet20. Default: by task."),
    ] = None,
    method: Annotated[
        Method, typer.Option(metavar="METHOD", help="See below.")
    ] = Method.progressive,
    sparsity: Annotated[float, typer.Option(help="Share of weights to switch off.")] = 0.9,
    scope: Annotated[
        Scope | None, typer.Option(help="Where weights compete. Default: by method.")
    ] = None,
    t1: Annotated[float, typer.Option(help="Part of training after which masks are fixed.")] = 0.75,
    every: Annotated[int | None, typer.Option(help="Steps between cuts.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    finetune_epochs: Annotated[
        int, typer.Option(help="With finetune: passes after the cut.", min=1)
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and order of the data.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: 1 to train.", min=1)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Training images to use, equally by class.", min=10)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("sapwood-prune"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train and prune one network, save it, pack it and time it."""
    task = task or (Task.mnist if data is not None else Task.digits)
    console.check_task("prune", task, data, t1)
    _check_arguments(method, sparsity, scope)
    console.require_ops()
    import torch

    from sapwood.cli import checkpoints, experiment, tasks

    if threads is not None:
        torch.set_num_threads(threads)
    request = experiment.Request(
        task=task.value,
        method=method.value,
        sparsity=sparsity,
        scope=None if scope is None else scope.value,
        t1=t1,
        every=every,
        epochs=epochs,
        finetune_epochs=finetune_epochs,
        seed=seed,
        arch=None if arch is None else arch.value,
        limit=limit,
        threads=threads or 1,
    )
    start = time.perf_counter()
    place = checkpoints.Place(out)
    with _reported(context, place):
        dataset = tasks.read(task.value, data, limit)
        finished = place.finished(request.setup(dataset)) if resume else None
        if finished is not None:
            _say_finished(finished, out, as_json)
            return
        outcome = _run(request, dataset, place, resume)
        files = experiment.save(out, outcome)
        place.remove()
    if as_json:
        console.print_json(outcome.report)
        return
    experiment.show(outcome)
    line = f"wrote {', '.join(files)} to {out} ({time.perf_counter() - start:.0f} s)"
    console.stdout().print(line, markup=False, soft_wrap=True)


def _run(request: Request, dataset: Dataset, place: Place, resume: bool) -> Outcome:
    from sapwood.cli import experiment
    from sapwood.cli.interrupt import Interrupts

    goes_on = place.open(request.setup(dataset), resume=resume)
    if resume and not goes_on:
        console.stderr().print(f"nothing to resume in {place.out}: starting anew", markup=False)
    with console.bars() as bars, Interrupts(bars.say) as interrupts:
        return experiment.execute(
            request,
            dataset,
            bars,
            place,
            resume=goes_on,
            observers=[lambda now: interrupts.check()],
        )


def _say_finished(report: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        console.print_json(report)
        return
    line = f"nothing to resume: the run in {out} is finished, accuracy {report['accuracy']:.2%}"
    console.stdout().print(line, markup=False, soft_wrap=True)


def _check_arguments(method: Method, sparsity: float, scope: Scope | None) -> None:
    if method is not Method.dense and not 0 < sparsity < 1:
        raise typer.BadParameter(f"--sparsity must lie between 0 and 1, got {sparsity}")
    known = METHODS[method.value].scopes
    if scope is not None and scope.value not in known:
        raise typer.BadParameter(
            f"--scope must be {' or '.join(known)} with --method {method.value}, got {scope.value}"
        )


@contextmanager
def _reported(context: typer.Context, place: Place) -> Iterator[None]:
    """Turns what can go wrong on the way into one line and an exit code."""
    try:
        with console.reported(place.out):
            yield
    except KeyboardInterrupt:
        if place.holds_steps:
            command = console.command_line(context, "--resume")
            console.fail(f"interrupted; to go on:\n{command}", console.INTERRUPTED)
        console.fail("interrupted; nothing was written", console.INTERRUPTED)
    finally:
        if not place.holds_steps:
            place.remove()
