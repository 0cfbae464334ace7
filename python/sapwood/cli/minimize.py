"""``sapwood minimize``: rewrite a pruned network into a smaller one, once or in cycles."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapwood.cli import console
from sapwood.cli.choices import Rules, Score, Shrinkable, Task

if TYPE_CHECKING:
    from sapwood.cli.shrinking import Shrunk
    from sapwood.data import Dataset

EPILOG = (
    "With --run, the network that 'sapwood prune' left in a folder is minimized as it is: nothing "
    "is trained, and the outputs stay the same up to rounding."
)


def minimize(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Option(help="Folder of 'sapwood prune': minimize its network.")
    ] = None,
    rules: Annotated[
        Rules, typer.Option(help="With --run: merge units that are multiples of others too.")
    ] = Rules.exact,
    task: Annotated[
        Task | None, typer.Option(help="Default: mnist with --data, else digits.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of MNIST's or CIFAR-10's files.")
    ] = None,
    arch: Annotated[
        Shrinkable,
        typer.Option(
            metavar="ARCH",
            help="mlp, lenet300, smallcnn, resnet20, convnext_micro or vit_micro.",
        ),
    ] = Shrinkable.lenet300,
    cycles: Annotated[int, typer.Option(help="Prune, minimize, release: how often.", min=1)] = 4,
    sparsity: Annotated[float, typer.Option(help="Of the first cycle.")] = 0.9,
    factor: Annotated[
        float, typer.Option(help="Share of weights that each further cycle leaves.")
    ] = 0.5,
    score: Annotated[Score, typer.Option(help="What goes first.")] = Score.group,
    release: Annotated[
        bool, typer.Option("--release/--no-release", help="Zeros train again between cycles.")
    ] = True,
    max_drop: Annotated[
        float | None, typer.Option(help="Stop when accuracy falls further, 0.01: one point.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the dense training.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of weights and order of the data.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: 1 to train.", min=1)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Training images to use, equally by class.", min=10)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("sapwood-minimize"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished cycle in OUT.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Shrink a network to a smaller dense one that computes the same."""
    console.require_ops()
    import torch

    from sapwood.cli import shrinking

    if run is None and rules is not Rules.exact:
        console.fail(f"--rules {rules.value} needs --run DIR", console.BAD_ARGUMENTS)
    torch.set_num_threads(threads or 1)
    start = time.perf_counter()
    with _reported(context, out), console.bars() as bars:
        if run is not None:
            dataset = _read(*shrinking.trained_on(run), data=data)
            shrunk = shrinking.once(run, dataset, bars, rules.value)
        else:
            task = task or (Task.mnist if data is not None else Task.digits)
            dataset = _read(task, limit, data=data)
            request = shrinking.Request(
                task=task.value,
                arch=arch.value,
                cycles=cycles,
                sparsity=sparsity,
                factor=factor,
                score=score.value,
                release=release,
                max_drop=max_drop,
                epochs=epochs,
                seed=seed,
                limit=limit,
            )
            shrunk = shrinking.cycle(request, dataset, out, bars, resume=resume)
        files = shrinking.save(out, shrunk)
    _tell(shrunk, files, out, as_json, time.perf_counter() - start)


def _read(task: Task, limit: int | None, *, data: Path | None) -> Dataset:
    from sapwood.cli import tasks

    console.check_task("minimize", task, data, t1=1.0)
    return tasks.read(task.value, data, limit)


def _tell(shrunk: Shrunk, files: list[str], out: Path, as_json: bool, seconds: float) -> None:
    from sapwood.cli import shrinking

    if as_json:
        console.print_json(shrunk.report)
        return
    shrinking.show(shrunk)
    line = f"wrote {', '.join(files)} to {out} ({seconds:.0f} s)"
    console.stdout().print(line, markup=False, soft_wrap=True)


@contextmanager
def _reported(context: typer.Context, out: Path) -> Iterator[None]:
    """Turns what can go wrong on the way into one line and an exit code."""
    from sapwood.cli import shrinking
    from sapwood.minimize import MinimizeError

    try:
        with console.reported(out):
            yield
    except MinimizeError as error:
        console.fail(str(error), console.BAD_ARGUMENTS)
    except KeyboardInterrupt:
        if shrinking.holds_cycles(out):
            command = console.command_line(context, "--resume")
            console.fail(f"interrupted; to go on:\n{command}", console.INTERRUPTED)
        console.fail("interrupted; nothing was written", console.INTERRUPTED)
