"""What ``sapwood prune`` does: train, pack, time, save, show."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialized

from sapwood import data
from sapwood._files import atomic_write_bytes, atomic_write_text, staged
from sapwood.cli import checkpoints, console, environment, packing, tasks, training
from sapwood.cli.checkpoints import Place, Setup
from sapwood.cli.choices import METHODS
from sapwood.cli.console import Bars
from sapwood.cli.methods import Recipe, position
from sapwood.cli.training import Observer
from sapwood.pruning import Progress

SCHEMA = "sapwood.prune/1"
TIMING_SECONDS = 0.5  # per batch size


@dataclass(frozen=True)
class Request:
    """What the command line asked for; None stands for what the task's plan or the method says."""

    task: str
    method: str
    sparsity: float = 0.9
    scope: str | None = None
    t1: float = 0.75
    every: int | None = None
    epochs: int | None = None
    finetune_epochs: int = 2
    seed: int = 0
    arch: str | None = None
    limit: int | None = None
    threads: int = 1

    @property
    def network(self) -> str:
        """The network's name."""
        return self.arch or tasks.PLANS[self.task].arch

    def recipe(self) -> Recipe:
        """Everything filled in."""
        plan = tasks.PLANS[self.task]
        return Recipe(
            method=self.method,
            sparsity=0.0 if self.method == "dense" else self.sparsity,
            epochs=self.epochs or plan.epochs,
            lr=plan.lr,
            weight_decay=plan.weight_decay,
            batch_size=plan.batch_size,
            seed=self.seed,
            scope=self.scope or METHODS[self.method].scopes[0],
            t1=self.t1,
            every=self.every or plan.every,
            finetune_epochs=self.finetune_epochs,
            threads=self.threads,
        )

    def setup(self, dataset: data.Dataset) -> Setup:
        """All that decides the outcome, under the options' names."""
        recipe = self.recipe()
        return {
            "task": self.task,
            "arch": self.network,
            "method": recipe.method,
            "sparsity": recipe.sparsity,
            "scope": recipe.scope,
            "t1": recipe.t1,
            "every": recipe.every,
            "epochs": recipe.epochs,
            "finetune-epochs": recipe.finetune_epochs,
            "seed": recipe.seed,
            "threads": recipe.threads,
            "limit": self.limit,
            "lr": recipe.lr,
            "weight-decay": recipe.weight_decay,
            "batch-size": recipe.batch_size,
            "data": tasks.fingerprint(dataset),
        }


@dataclass(frozen=True)
class Outcome:
    """A trained network, how fast it is when packed, and all figures as plain data."""

    run: training.Run
    images: int  # in the test set
    packed: packing.Packed | None  # None: the network is dense
    timings: list[packing.Timing]
    report: dict[str, Any]


def execute(
    request: Request,
    dataset: data.Dataset,
    bars: Bars,
    place: Place,
    *,
    resume: bool,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Trains and prunes; then packs the result and times it against itself, unpacked."""
    recipe = request.recipe()
    model = tasks.network(request.network, dataset, request.seed)
    bars.start(request.method)
    [run] = training.train(
        recipe,
        dataset,
        model,
        observers=[shown(recipe, bars), *observers],
        checkpoint=place.folder,
        resume=resume,
    )
    packed: packing.Packed | None = None
    timings: list[packing.Timing] = []
    if run.masks is not None:
        packed = packing.pack(run.model, dataset.test_inputs)
        if any(layer.report.packed for layer in packed.layers):
            networks = {"dense": run.model, "packed": packed.model}
            timings = packing.time_models(
                networks, dataset.test_inputs, bars, seconds=TIMING_SECONDS
            )
    report = {
        "schema": SCHEMA,
        "task": request.task,
        "data": dataset.source,
        "arch": request.network,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "environment": environment.describe(),
        **training.as_data(run),
        "setup": request.setup(dataset),
    }
    if packed is not None:
        report["packed"] = packing.as_data(packed, timings, "packed")
    return Outcome(run, len(dataset.test_labels), packed, timings, report)


def shown(recipe: Recipe, bars: Bars) -> Observer:
    """Moves the bar; its name is the stage of a method that has several."""

    def show(now: Progress) -> None:
        done, total = position(recipe, now)
        name = recipe.method if done == now.step and total == now.total else now.stage
        bars.step(done, total, f"loss {now.loss:6.3f}  sparsity {now.sparsity:6.1%}", name)

    return show


def save(out: Path, outcome: Outcome) -> list[str]:
    """Writes all files or none; returns their names."""
    run = outcome.run
    with staged(out) as stage:
        weights = serialized(run.model.state_dict())
        atomic_write_bytes(stage / "model.safetensors", weights)
        if run.masks is not None and run.report is not None:
            run.masks.save(stage / "masks.safetensors")
            atomic_write_text(stage / "sparsity.csv", run.report.to_csv())
            if draws():
                atomic_write_text(stage / "sparsity.svg", run.report.to_svg())
        content = json.dumps(outcome.report, indent=2) + "\n"
        atomic_write_text(stage / checkpoints.REPORT, content)
        return sorted(file.name for file in stage.iterdir())


def draws() -> bool:
    """Whether there is what it takes to draw."""
    return importlib.util.find_spec("matplotlib") is not None


def show(outcome: Outcome) -> None:
    """Prints the accuracy, both counts of zeros, and what packing brought."""
    out, run = console.stdout(), outcome.run
    out.print(
        f"{run.recipe.method}: {run.accuracy:.2%} of {outcome.images} test images right "
        f"({run.wrong} wrong), trained in {run.seconds:.0f} s"
    )
    if run.report is not None:
        out.print()
        out.print(run.report.table(), markup=False)
    if outcome.packed is not None:
        _show_packed(run, outcome.packed, outcome.timings)
    if run.report is not None and not draws():
        missing = "sparsity.svg is missing: it needs matplotlib, pip install 'sapwood[tour]'"
        out.print(missing, markup=False)


def _show_packed(run: training.Run, packed: packing.Packed, timings: list[packing.Timing]) -> None:
    out = console.stdout()
    out.print()
    if not timings:
        out.print("no layer is packed: sapwood packs linear layers, where that is faster")
        return
    rows = [
        [
            layer.report.name,
            " x ".join(map(str, layer.report.shape)),
            f"{layer.report.sparsity:.2%}",
            *(layer.formats[batch] for batch in packing.BATCHES),
        ]
        for layer in packed.layers
    ]
    gains = [packing.ratio(timing.speedup("packed")) for timing in timings]
    rows.append(["speed-up over dense", "", f"{run.zeros:.2%}", *gains])
    heads = ["packed", "shape", "zeros", *(f"batch {batch}" for batch in packing.BATCHES)]
    out.print(console.table("", heads, rows))
    for remark in packing.remarks(timings, ["packed"]):
        out.print(remark, markup=False)
    out.print(f"packed and masked outputs differ by at most {packed.max_difference:.1e}")
