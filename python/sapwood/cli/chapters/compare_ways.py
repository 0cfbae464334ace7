"""Chapter 2: several ways to prune the same small network, under one recipe."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from sapwood.cli import comparison, comparison_page, pool, tasks
from sapwood.cli import comparison_text as text
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.cli.choices import Variant
from sapwood.cli.comparison import Request, Result
from sapwood.cli.interrupt import Interrupts
from sapwood.cli.runs import Job
from sapwood.report.page import Chapter, Section, Table

TITLE = "Compare ways to prune"
QUICK = ("one-shot", "progressive", "cubic", "snip", "random")
FULL = ("one-shot", "finetune", "progressive", "cubic", "lth", "snip", "rigl", "random")


def run(context: Context) -> ChapterResult:
    """Trains all networks in this process: some seconds, or half a minute without ``quick``."""
    names = QUICK if context.quick else FULL
    request = Request(
        task="digits",
        data=None,
        variants=tuple(map(Variant.parse, names)),
        sparsities=(0.9, 0.95) if context.quick else (0.9, 0.95, 0.98),
        seeds=(context.seed,),
    )
    result = _measure(request, context)
    return ChapterResult(
        page=Chapter(TITLE, _lead(result), _sections(result)),
        headline=comparison_page.headline(result),
        stats=[],
        summary=_summary(result),
        remarks=[
            f"{text.title(result)}.",
            text.cost_unit(result),
            *text.chance(result),
            *(text.exactness(result) if result.faults else []),
        ],
        facts=[("Comparison", f"{request.network}, {request.recipe(0).epochs} epochs, one seed")],
        data={"title": TITLE, **comparison.as_data(result)},
    )


def _measure(request: Request, context: Context) -> Result:
    dataset = tasks.read(request.task, None)
    jobs = request.jobs()
    per_epoch = math.ceil(len(dataset.train_labels) / request.recipe(0).batch_size)
    total, state = per_epoch * sum(job.epochs for job in jobs), {"steps": 0, "jobs": 0}
    context.bars.start("compare")

    def advance(steps: int) -> None:
        state["steps"] += steps
        note = f"network {state['jobs'] + 1} of {len(jobs)}"
        context.bars.step(state["steps"], total, note)

    def finish(job: Job) -> None:
        state["jobs"] += 1

    with tempfile.TemporaryDirectory(prefix="sapwood-") as name:
        listener = pool.Listener(advance, finish)
        pool.one_by_one(jobs, dataset, Path(name), listener, Interrupts())
        return comparison.collect(request, dataset.source, Path(name))


def _lead(result: Result) -> str:
    recipe = result.request.recipe(0)
    return (
        f"{len(result.request.variants)} ways to lose the same number of weights. Every network "
        f"starts from the same weights and sees the same batches for {recipe.epochs} epochs; what "
        "differs is which weights go, and when."
    )


def _sections(result: Result) -> list[Section]:
    accuracy, methods = comparison_page.sections(result)
    spread = (
        "This is a small network on a small test set: take the large differences as true, and the "
        "small ones as chance. sapwood compare --seeds 0,1,2 shows how much the seed matters."
    )
    return [
        Section(accuracy.heading, [*accuracy.paragraphs, spread], accuracy.blocks),
        methods,
    ]


def _summary(result: Result) -> Table:
    sparsities = [text.percent(s) for s in result.request.sparsities]
    rows = [
        [
            name,
            text.cost(result, cells),
            *(f"{text.number(row.mean)} {text.gap(row.gap)}" for row in cells),
        ]
        for name, cells in text.by_method(result).items()
    ]
    return Table(["method", "cost", *sparsities], rows)
