"""What ``sapwood compare`` does: plan the runs, do those that are missing, put them together."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sapwood._files import atomic_write_text
from sapwood.cli import environment, pool, runs, tasks
from sapwood.cli.choices import Variant
from sapwood.cli.interrupt import Interrupts
from sapwood.cli.methods import Recipe
from sapwood.cli.runs import Job, Record
from sapwood.data import Dataset

SCHEMA = "sapwood.compare/1"
SETUP = "setup.json"
SETUP_SCHEMA = "sapwood.compare.setup/1"


@dataclass(frozen=True)
class Request:
    """What the command line asked for; None stands for what the task's plan says."""

    task: str
    data: Path | None
    variants: tuple[Variant, ...]
    sparsities: tuple[float, ...]  # rising
    seeds: tuple[int, ...]
    arch: str | None = None
    epochs: int | None = None
    finetune_epochs: int = 2
    t1: float = 0.75
    every: int | None = None
    limit: int | None = None

    @property
    def network(self) -> str:
        """The network's name."""
        return self.arch or tasks.PLANS[self.task].compared

    def recipe(self, seed: int) -> Recipe:
        """The dense recipe of a seed; the others differ in method, sparsity and scope."""
        plan = tasks.PLANS[self.task]
        return Recipe(
            method="dense",
            sparsity=0.0,
            epochs=self.epochs or plan.epochs,
            lr=plan.lr,
            batch_size=plan.batch_size,
            seed=seed,
            weight_decay=plan.weight_decay,
            t1=self.t1,
            every=self.every or plan.every,
            finetune_epochs=self.finetune_epochs,
        )

    def jobs(self) -> list[Job]:
        """All jobs, each after those it needs."""
        recipes = [self.recipe(seed) for seed in self.seeds]
        return runs.plan(self.variants, self.sparsities, self.network, recipes)

    def setup(self) -> dict[str, Any]:
        """What all runs of one folder must have in common, under the options' names."""
        recipe = self.recipe(0)
        return {
            "schema": SETUP_SCHEMA,
            "task": self.task,
            "arch": self.network,
            "limit": self.limit,
            "epochs": recipe.epochs,
            "finetune-epochs": recipe.finetune_epochs,
            "t1": recipe.t1,
            "every": recipe.every,
            "lr": recipe.lr,
            "weight-decay": recipe.weight_decay,
            "batch-size": recipe.batch_size,
        }


@dataclass(frozen=True)
class Row:
    """One method at one sparsity, over all seeds; accuracies are shares."""

    method: str
    sparsity: float
    mean: float
    lowest: float
    highest: float
    gap: float  # to the mean of dense
    epochs: int  # passes over the data of one seed, from the first weight to the result
    seeds: int


@dataclass(frozen=True)
class Result:
    """All runs of a comparison and their summary."""

    request: Request
    source: str  # of the data
    records: list[Record]

    @property
    def dense(self) -> Row:
        """The baseline."""
        return self.row("dense", 0.0)

    @property
    def rows(self) -> list[Row]:
        """One per method and sparsity, in the order asked for, without dense."""
        names = [str(variant) for variant in self.request.variants if variant.method != "dense"]
        return [self.row(name, s) for name in names for s in self.request.sparsities]

    def row(self, method: str, sparsity: float) -> Row:
        """The summary of a method at a sparsity."""
        found = self._of(method, sparsity)
        values = [record["accuracy"] for record in found]
        dense = fmean(record["accuracy"] for record in self._of("dense", 0.0))
        return Row(
            method=method,
            sparsity=sparsity,
            mean=fmean(values),
            lowest=min(values),
            highest=max(values),
            gap=fmean(values) - dense,
            epochs=found[0]["epochs"],
            seeds=len(found),
        )

    def _of(self, method: str, sparsity: float) -> list[Record]:
        return [r for r in self.records if (r["method"], r["sparsity"]) == (method, sparsity)]

    @property
    def faults(self) -> list[str]:
        """What is wrong with masks; empty when every one is exact."""
        return [fault for record in self.records for fault in runs.faults(record)]

    def csv(self) -> str:
        """One line per method and sparsity, dense first; accuracies in percent."""
        text = io.StringIO()
        heads = ["method", "sparsity", "mean", "lowest", "highest", "gap", "epochs", "seeds"]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(heads)
        for row in (self.dense, *self.rows):
            shares = (row.mean, row.lowest, row.highest, row.gap)
            percents = [f"{100 * share:.4f}" for share in shares]
            writer.writerow([row.method, repr(row.sparsity), *percents, row.epochs, row.seeds])
        return text.getvalue()


def open_folder(out: Path, request: Request, dataset: Dataset, resume: bool) -> Path:
    """The folder of the runs; made when missing.

    Raises:
        ValueError: when it holds runs and ``resume`` is not set, or runs under another set-up.
    """
    folder = out / runs.FOLDER
    setup = {**request.setup(), "data": tasks.fingerprint(dataset)}
    path = folder / SETUP
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(setup, indent=1) + "\n")
        return folder
    if not resume:
        raise ValueError(
            f"{out} holds the runs of a comparison: --resume goes on with them, "
            "another --out begins anew"
        )
    there = json.loads(path.read_text(encoding="utf-8"))
    for key, value in setup.items():
        if there.get(key) != value:
            raise ValueError(
                f"{out} holds runs with --{key} {there.get(key)}, got {value}; take another --out"
            )
    return folder


def holds_runs(out: Path) -> bool:
    """Whether there is a comparison to go on with."""
    return (out / runs.FOLDER / SETUP).exists()


def missing(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs whose results are not there yet."""
    return [job for job in jobs if runs.stored(job, folder) is None]


def execute(
    todo: Sequence[Job],
    request: Request,
    dataset: Dataset,
    folder: Path,
    workers: int,
    listener: pool.Listener,
) -> None:
    """Does the missing jobs.

    Raises:
        KeyboardInterrupt: after the checkpoints of all running jobs are written.
        JobError: when a job fails.
    """
    with Interrupts(listener.say) as interrupts:
        if workers == 1:
            pool.one_by_one(todo, dataset, folder, listener, interrupts)
            return
        there = {name for job in request.jobs() for name in job.names}
        there -= {name for job in todo for name in job.names}
        source = (request.task, request.data, request.limit)
        pool.several_at_once(todo, source, folder, workers, there, listener, interrupts)


def collect(request: Request, source: str, folder: Path) -> Result:
    """Reads the results of all jobs."""
    records = [record for job in request.jobs() for record in runs.stored(job, folder) or []]
    return Result(request, source, records)


def one_line(job: Job, folder: Path) -> str:
    """The results of a job for people."""
    records = runs.stored(job, folder) or []
    values = [f"{100 * record['accuracy']:.2f} %" for record in records]
    if len(records) > 1:
        values = [f"{100 * r['sparsity']:g} %: {v}" for r, v in zip(records, values, strict=True)]
    seconds = sum(record["seconds"] for record in records[-1:])
    return f"{job.title}: {', '.join(values)} ({seconds:.0f} s)"


def as_data(result: Result) -> dict[str, Any]:
    """Everything as plain data for a JSON report."""
    return {
        "schema": SCHEMA,
        "data": result.source,
        "setup": result.request.setup(),
        "seeds": list(result.request.seeds),
        "environment": environment.describe(),
        "rows": [asdict(row) for row in (result.dense, *result.rows)],
        "faults": result.faults,
        "runs": result.records,
    }
