"""What ``sapwood minimize`` does: one rewrite or several cycles, timed, saved and shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sapwood import data
from sapwood._files import atomic_write_text, staged
from sapwood.cli import checkpoints, console, environment, packing, tasks
from sapwood.cli.choices import Task
from sapwood.cli.console import Bars
from sapwood.cli.interrupt import Interrupts
from sapwood.minimize import (
    MinimizeReport,
    SqueezeRelease,
    SqueezeReleaseResult,
    minimize,
)
from sapwood.minimize import (
    save as save_network,
)
from sapwood.pruning import MaskSet, Progress, TrainConfig

SCHEMA = "sapwood.minimize/1"
TIMING_SECONDS = 0.5  # per batch size
_CYCLES = "cycles"  # the folder of the networks, inside the one for the results
_EXAMPLES = 8  # images that the network is traced and verified with


@dataclass(frozen=True)
class Request:
    """What the command line asked for; None stands for what the task's plan says."""

    task: str
    arch: str
    cycles: int = 4
    sparsity: float = 0.9
    factor: float = 0.5
    score: str = "group"
    release: bool = True
    max_drop: float | None = None
    epochs: int | None = None
    seed: int = 0
    limit: int | None = None

    @property
    def config(self) -> TrainConfig:
        """How all phases train: transformers and ConvNeXt with AdamW, the others as the task."""
        plan = tasks.PLANS[self.task]
        epochs = self.epochs or max(plan.epochs, 8)
        if self.arch in tasks.PATCHED:
            return TrainConfig(
                epochs=epochs,
                lr=2e-3,
                optimizer="adamw",
                weight_decay=0.05,
                batch_size=plan.batch_size,
                seed=self.seed,
                device="cpu",
            )
        return TrainConfig(
            epochs=epochs,
            lr=min(plan.lr, 0.1),
            weight_decay=plan.weight_decay,
            batch_size=plan.batch_size,
            seed=self.seed,
            device="cpu",
        )


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    name: str
    parameters: int
    macs: int
    accuracy: float
    max_error: float | None  # of the rewrite, in float64, relative to the output's scale
    zeros: float  # share of the weights


@dataclass(frozen=True)
class Shrunk:
    """The networks, how fast the smallest one is against the first, and all figures."""

    rows: list[Row]
    network: nn.Module  # the best
    minimized: MinimizeReport | None  # of --run
    refusals: list[str]
    timings: list[packing.Timing]
    report: dict[str, Any]


def trained_on(run: Path) -> tuple[Task, int | None]:
    """The task and the limit of a finished ``sapwood prune``.

    Raises:
        ValueError: when the folder holds no report of one.
    """
    report = _prune_report(run)
    return Task(report["task"]), report["setup"]["limit"]


def once(run: Path, dataset: data.Dataset, bars: Bars, rules: str) -> Shrunk:
    """Minimizes the network of a finished ``sapwood prune``; nothing is trained."""
    setup = _prune_report(run)["setup"]
    model = tasks.network(setup["arch"], dataset, setup["seed"])
    model.load_state_dict(load_file(run / "model.safetensors"))
    masks = None
    if (run / "masks.safetensors").exists():
        masks = MaskSet.load(run / "masks.safetensors")
    model.eval()
    small, report = minimize(model, dataset.test_inputs[:_EXAMPLES], masks=masks, rules=rules)
    rows = [
        Row(
            "masked",
            report.parameters_before,
            report.macs_before,
            _accuracy(model, dataset),
            None,
            _zeros(model),
        ),
        Row(
            "minimized",
            report.parameters_after,
            report.macs_after,
            _accuracy(small, dataset),
            report.max_error,
            _zeros(small),
        ),
    ]
    outputs = _outputs(model, dataset.test_inputs), _outputs(small, dataset.test_inputs)
    same = int((outputs[0].argmax(1) == outputs[1].argmax(1)).sum())
    figures = {
        "rules": rules,
        **report.to_dict(),
        "same_predictions": same,
        "predictions": len(outputs[0]),
        "max_difference": float((outputs[0] - outputs[1]).abs().max()),
    }
    refusals = [str(refusal) for refusal in report.refusals]
    return _finished(rows, model, small, report, refusals, dataset, bars, setup, figures)


def cycle(
    request: Request, dataset: data.Dataset, out: Path, bars: Bars, *, resume: bool
) -> Shrunk:
    """Trains a network and shrinks it in cycles, whose networks stay in ``out``."""
    model = tasks.network(request.arch, dataset, request.seed)
    bars.start("dense")
    with Interrupts(bars.say) as interrupts:

        def progress(now: Progress) -> None:
            note = f"loss {now.loss:6.3f}  sparsity {now.sparsity:6.1%}"
            bars.step(now.step, now.total, note, now.stage)
            interrupts.check()

        driver = SqueezeRelease(
            cycles=request.cycles,
            first_sparsity=request.sparsity,
            nnz_factor=request.factor,
            score=request.score,
            train=request.config,
            release=request.release,
            max_drop=request.max_drop,
            progress=progress,
            checkpoint=out / _CYCLES,
            resume=resume,
        )
        pairs = (dataset.train_inputs, dataset.train_labels)
        result = driver.fit(model, pairs, (dataset.test_inputs, dataset.test_labels))
    rows = _rows(result)
    setup = {**asdict(request), "train": asdict(request.config)}
    setup["data"] = tasks.fingerprint(dataset)
    refusals = list(result.best.refusals)
    return _finished(
        rows, model, result.model, None, refusals, dataset, bars, setup, result.to_dict()
    )


def _rows(result: SqueezeReleaseResult) -> list[Row]:
    return [
        Row(
            f"cycle {point.number}" if point.number else "dense",
            point.parameters,
            point.macs,
            point.metric,
            point.max_error,
            point.sparsity,
        )
        for point in (result.dense, *result.cycles)
    ]


def _finished(
    rows: list[Row],
    model: nn.Module,
    small: nn.Module,
    minimized: MinimizeReport | None,
    refusals: list[str],
    dataset: data.Dataset,
    bars: Bars,
    setup: dict[str, Any],
    figures: dict[str, Any],
) -> Shrunk:
    """Adds the timing of the network's full size against the smallest one."""
    networks = {"dense": model.eval(), "minimized": small.eval()}
    timings = packing.time_models(networks, dataset.test_inputs, bars, seconds=TIMING_SECONDS)
    report = {
        "schema": SCHEMA,
        "environment": environment.describe(),
        "setup": setup,
        **figures,
        "networks": [asdict(row) for row in rows],
        "timings": [
            {
                "batch": timing.batch,
                "dense_seconds": timing.best["dense"],
                "minimized_seconds": timing.best["minimized"],
                "speedup": timing.speedup("minimized"),
                "undisturbed": timing.undisturbed,
            }
            for timing in timings
        ],
    }
    return Shrunk(rows, small, minimized, refusals, timings, report)


def save(out: Path, shrunk: Shrunk) -> list[str]:
    """Writes the network and the report, both or none; returns their names."""
    with staged(out) as stage:
        save_network(shrunk.network, stage / "model.safetensors", report=shrunk.minimized)
        content = json.dumps(shrunk.report, indent=2) + "\n"
        atomic_write_text(stage / checkpoints.REPORT, content)
        return sorted(file.name for file in stage.iterdir())


def holds_cycles(out: Path) -> bool:
    """Whether there is something that ``--resume`` goes on with."""
    return any((out / _CYCLES).glob("*.json"))


def show(shrunk: Shrunk) -> None:
    """Prints the networks, what stayed and why, and how much faster the smallest one is."""
    out = console.stdout()
    first = shrunk.rows[0].parameters
    cells = [
        [
            row.name,
            f"{row.parameters:,}",
            "" if row.parameters == first else f"{first / row.parameters:.1f}x",
            f"{row.macs / _EXAMPLES:,.0f}",
            f"{row.zeros:.0%}",
            f"{row.accuracy:.2%}",
            "" if row.max_error is None else f"{row.max_error:.0e}",
        ]
        for row in shrunk.rows
    ]
    heads = ["network", "parameters", "smaller", "MACs", "zeros", "accuracy", "error"]
    out.print(console.table("", heads, cells))
    gains = [f"{packing.ratio(t.speedup('minimized'))} at {t.batch}" for t in shrunk.timings]
    out.print(f"faster than the full size by batch: {', '.join(gains)}", markup=False)
    for remark in packing.remarks(shrunk.timings, ["minimized"]):
        out.print(remark, markup=False)
    for refusal in shrunk.refusals:
        out.print(f"kept at full width: {refusal}", markup=False)


def _prune_report(run: Path) -> dict[str, Any]:
    path = run / checkpoints.REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--run must be a folder of 'sapwood prune', got no {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object, got {error}") from None
    if not isinstance(report, dict) or not str(report.get("schema")).startswith("sapwood.prune/"):
        raise ValueError(f"--run must be a folder of 'sapwood prune', got another report in {path}")
    return report


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(512)])


def _accuracy(model: nn.Module, dataset: data.Dataset) -> float:
    right = _outputs(model, dataset.test_inputs).argmax(1) == dataset.test_labels
    return float(right.double().mean())


def _zeros(model: nn.Module) -> float:
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    return 1.0 - sum(int(weight.count_nonzero()) for weight in weights) / total
