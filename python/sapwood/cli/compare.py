"""``sapwood compare``: several methods, sparsities and seeds under one recipe, in one table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapwood.cli import console
from sapwood.cli.choices import METHOD_HELP, Arch, Task, Variant

if TYPE_CHECKING:
    from sapwood.cli.comparison import Request
    from sapwood.cli.runs import Job
    from sapwood.data import Dataset

EPILOG = (
    f"{METHOD_HELP}\n\n"
    "SCOPE is global, layer or erk. random:METHOD has as many weights per layer as METHOD."
)
DEFAULT_METHODS = "one-shot,progressive,cubic,snip,random"


def compare(
    context: typer.Context,
    task: Annotated[
        Task | None, typer.Option(help="Default: mnist with --data, else digits.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of MNIST's idx files, or CIFAR-10's files.")
    ] = None,
    arch: Annotated[
        Arch | None,
        typer.Option(metavar="ARCH", help="mlp, lenet300, smallcnn or resnet20. Default: by task."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            show_default=False,
            help="Comma list of METHOD, METHOD:SCOPE, random:METHOD. Default: one-shot, "
            "progressive, cubic, snip, random.",
        ),
    ] = DEFAULT_METHODS,
    sparsity: Annotated[str, typer.Option(help="Comma list.")] = "0.9,0.95,0.98",
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "0",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    finetune_epochs: Annotated[int, typer.Option(help="With finetune: after the cut.", min=1)] = 2,
    t1: Annotated[float, typer.Option(help="Part of training after which masks are fixed.")] = 0.75,
    every: Annotated[int | None, typer.Option(help="Steps between cuts.", min=1)] = None,
    limit: Annotated[
        int | None, typer.Option(help="Training images to use, equally by class.", min=10)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, one thread each.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for runs and results.")] = Path(
        "sapwood-compare"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is done in OUT, do the rest.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare ways to prune: accuracy by method and sparsity."""
    task = task or (Task.mnist if data is not None else Task.digits)
    console.check_task("compare", task, data, t1)
    variants, sparsities, chosen = _variants(methods), _sparsities(sparsity), _seeds(seeds)
    console.require("compare", {"matplotlib": "matplotlib", "jinja2": "jinja2"})
    console.require_ops()
    from sapwood.cli import comparison, comparison_page, comparison_text, tasks

    request = comparison.Request(
        task=task.value,
        data=data,
        variants=variants,
        sparsities=sparsities,
        seeds=chosen,
        arch=None if arch is None else arch.value,
        epochs=epochs,
        finetune_epochs=finetune_epochs,
        t1=t1,
        every=every,
        limit=limit,
    )
    start = time.perf_counter()
    with _reported(context, request, out):
        dataset = tasks.read(task.value, data, limit)
        folder = comparison.open_folder(out, request, dataset, resume)
        _execute(request, dataset, folder, jobs)
        result = comparison.collect(request, dataset.source, folder)
        files = comparison_page.save(out, result)
    if as_json:
        console.print_json(comparison.as_data(result))
        return
    screen = console.stdout()
    screen.print(f"[bold]{comparison_text.title(result)}[/]")
    for table in comparison_text.tables(result):
        screen.print(table)
    for remark in comparison_text.remarks(result):
        screen.print(remark, markup=False)
    line = f"wrote {', '.join(files)} to {out} ({time.perf_counter() - start:.0f} s)"
    screen.print(line, markup=False, soft_wrap=True)


def _execute(request: Request, dataset: Dataset, folder: Path, workers: int) -> None:
    """Does the missing jobs; shows how far it is, and each result as it comes."""
    from sapwood.cli import comparison, pool

    jobs = request.jobs()
    todo = comparison.missing(jobs, folder)
    if not todo:
        return
    per_epoch = math.ceil(len(dataset.train_labels) / request.recipe(0).batch_size)
    total = per_epoch * sum(job.epochs for job in todo)
    done = {"jobs": len(jobs) - len(todo), "steps": 0}
    start = time.perf_counter()
    with console.bars() as bars:

        def advance(steps: int) -> None:
            done["steps"] += steps
            left = (time.perf_counter() - start) * (total - done["steps"]) / done["steps"]
            note = f"about {_duration(left)} left"
            bars.step(done["steps"], total, note, f"run {done['jobs'] + 1} of {len(jobs)}")

        def finish(job: Job) -> None:
            done["jobs"] += 1
            bars.say(comparison.one_line(job, folder))

        bars.start("")
        listener = pool.Listener(advance, finish, bars.say)
        comparison.execute(todo, request, dataset, folder, workers, listener)


def _duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours.

    >>> _duration(75), _duration(1500), _duration(9000)
    ('75 s', '25 min', '2.5 h')
    """
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7170 else f"{seconds / 3600:.1f} h"


@contextmanager
def _reported(context: typer.Context, request: Request, out: Path) -> Iterator[None]:
    """Turns what can go wrong on the way into one line and an exit code."""
    from sapwood.cli import comparison, pool

    try:
        with console.reported(out):
            yield
    except pool.JobError as error:
        command = console.command_line(context, "--resume")
        console.fail(f"{error}\nFinished runs are kept; to go on:\n{command}", code=1)
    except KeyboardInterrupt:
        if not comparison.holds_runs(out):
            console.fail("interrupted; nothing was written", console.INTERRUPTED)
        command = console.command_line(context, "--resume")
        console.fail(f"interrupted; to go on:\n{command}", console.INTERRUPTED)


def _variants(text: str) -> tuple[Variant, ...]:
    try:
        found = tuple(dict.fromkeys(Variant.parse(word) for word in _words(text, "--methods")))
    except ValueError as error:
        raise typer.BadParameter(f"--methods: {error}") from None
    asked = {str(variant) for variant in found}
    for variant in found:
        if variant.like is not None and variant.like not in asked:
            raise typer.BadParameter(f"--methods: {variant} needs {variant.like} in the list too")
    return found


def _sparsities(text: str) -> tuple[float, ...]:
    values = []
    for word in _words(text, "--sparsity"):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not 0 < value < 1:
            raise typer.BadParameter(f"--sparsity must lie between 0 and 1, got {word}")
        values.append(value)
    return tuple(sorted(set(values)))


def _seeds(text: str) -> tuple[int, ...]:
    words = _words(text, "--seeds")
    for word in words:
        if not word.isdecimal():
            raise typer.BadParameter(f"--seeds must be whole numbers from 0 on, got {word}")
    return tuple(dict.fromkeys(int(word) for word in words))


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise typer.BadParameter(f"{option} must name at least one, got {text!r}")
    return words
