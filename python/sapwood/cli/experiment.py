"""What ``sapwood prune`` does: read, train, pack, time, save, show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialized

from sapwood import data
from sapwood._files import atomic_write_bytes, atomic_write_text, staged
from sapwood.cli import console, environment, packing, training
from sapwood.cli.console import Bars

SCHEMA = "sapwood.prune/1"


@dataclass(frozen=True)
class Plan:
    """The network of a task and what is usual for training it."""

    hidden: tuple[int, ...]
    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    every: int  # steps between cuts


PLANS = {
    "digits": Plan((1024, 1024), epochs=15, lr=0.2, weight_decay=1e-3, batch_size=64, every=10),
    # LeNet-300-100
    "mnist": Plan((300, 100), epochs=8, lr=0.1, weight_decay=1e-4, batch_size=128, every=50),
}


@dataclass(frozen=True)
class Request:
    """What the command line asked for; None stands for what the task's plan says."""

    task: str
    method: str
    sparsity: float
    scope: str
    t1: float
    every: int | None
    epochs: int | None
    finetune_epochs: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """A trained network, how fast it is when packed, and all figures as plain data."""

    run: training.Run
    images: int  # in the test set
    packed: packing.Packed | None  # None: the network is dense
    timings: list[packing.Timing]
    report: dict[str, Any]


def read(task: str, folder: Path | None) -> data.Dataset:
    """The data of a task; ``folder`` holds the files of those that do not come with a package."""
    return data.load_digits() if folder is None else data.load_mnist(folder)


def execute(request: Request, dataset: data.Dataset, bars: Bars) -> Outcome:
    """Trains and prunes; then packs the result and times it against itself, unpacked."""
    plan = PLANS[request.task]
    recipe = training.Recipe(
        method=request.method,
        sparsity=request.sparsity,
        epochs=request.epochs or plan.epochs,
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        batch_size=plan.batch_size,
        seed=request.seed,
        scope=request.scope,
        t1=request.t1,
        every=request.every or plan.every,
        finetune_epochs=request.finetune_epochs,
    )
    run = training.train(request.method, recipe, dataset, plan.hidden, bars)
    packed: packing.Packed | None = None
    timings: list[packing.Timing] = []
    if request.sparsity:
        packed = packing.pack(run.model, dataset.test_inputs)
        networks = {"dense": run.model, "packed": packed.model}
        timings = packing.time_models(networks, dataset.test_inputs, bars, seconds=0.5)
    report = {
        "schema": SCHEMA,
        "task": request.task,
        "data": dataset.source,
        "layers": [dataset.features, *plan.hidden, dataset.classes],
        "environment": environment.describe(),
        **training.as_data(run),
    }
    if packed is not None:
        report["packed"] = packing.as_data(packed, timings, "packed")
    return Outcome(run, len(dataset.test_labels), packed, timings, report)


def save(out: Path, outcome: Outcome) -> list[str]:
    """Writes all files or none; returns their names."""
    with staged(out) as stage:
        weights = serialized(outcome.run.model.state_dict())
        atomic_write_bytes(stage / "model.safetensors", weights)
        if outcome.run.masks is not None:
            outcome.run.masks.save(stage / "masks.safetensors")
        atomic_write_text(stage / "report.json", json.dumps(outcome.report, indent=2) + "\n")
        return sorted(file.name for file in stage.iterdir())


def show(outcome: Outcome) -> None:
    """Prints the accuracy, and layer by layer what packing brought."""
    out, run, packed = console.stdout(), outcome.run, outcome.packed
    out.print(
        f"{run.name}: {run.accuracy:.2%} of {outcome.images} test images right "
        f"({run.wrong} wrong), trained in {run.seconds:.0f} s"
    )
    if packed is None:
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
    gains = [packing.ratio(timing.speedup("packed")) for timing in outcome.timings]
    rows.append(["speed-up over dense", "", f"{run.zeros:.2%}", *gains])
    heads = ["layer", "shape", "zeros", *(f"batch {batch}" for batch in packing.BATCHES)]
    out.print(console.table("", heads, rows))
    for remark in packing.remarks(outcome.timings, ["packed"]):
        out.print(remark, markup=False)
    out.print(f"packed and masked outputs differ by at most {packed.max_difference:.1e}")
