"""How the command line trains: one network, one recipe, one method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sapwood import pruning
from sapwood.cli.console import Bars
from sapwood.data import Dataset

FINETUNE_LR = 0.1  # of the learning rate before the cut


@dataclass(frozen=True)
class Recipe:
    """All that decides the outcome of a training run."""

    method: str  # "progressive", "cubic", "one-shot" or "dense"
    sparsity: float
    epochs: int
    lr: float
    batch_size: int
    seed: int
    weight_decay: float = 1e-4
    scope: str = "global"
    t1: float = 0.75  # part of the steps after which the masks are fixed
    every: int = 10  # steps between cuts
    finetune_epochs: int = 2  # after a one-shot cut


@dataclass(frozen=True)
class Run:
    """One trained network and how it came about."""

    name: str
    recipe: Recipe
    model: nn.Module
    masks: pruning.MaskSet | None  # None: dense
    report: pruning.SparsityReport | None
    history: list[dict[str, float]]  # one row per epoch
    trace: list[tuple[int, float]]  # (step, sparsity after that step)
    accuracy: float  # on the test set
    wrong: int
    seconds: float

    @property
    def zeros(self) -> float:
        """Share of the prunable weights that are off."""
        return 0.0 if self.masks is None else self.masks.sparsity()


def perceptron(data: Dataset, hidden: tuple[int, ...], seed: int) -> nn.Sequential:
    """A multilayer perceptron for a data set, its weights drawn with ``seed``."""
    torch.manual_seed(seed)
    sizes = (data.features, *hidden, data.classes)
    layers: list[nn.Module] = []
    for k, n in pairwise(sizes):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(name: str, recipe: Recipe, data: Dataset, hidden: tuple[int, ...], bars: Bars) -> Run:
    """Trains one network by one method, on one thread: the outcome depends on the recipe alone.

    Equal recipes but for method and sparsity start from the same weights and see the same batches.

    Args:
        name: shown beside the progress bar.
        recipe: what decides the outcome.
        data: to learn and to test on.
        hidden: widths of the hidden layers.
        bars: where progress is shown.

    Returns:
        The network, in evaluation mode, with its masks and figures.
    """
    trace = [(0, 0.0)]
    bars.start(name)

    def progress(now: pruning.Progress) -> None:
        step = trace[-1][0] + 1  # counts on through a fine-tuning run
        trace.append((step, now.sparsity))
        total = step + now.total - now.step
        bars.step(step, total, f"loss {now.loss:6.3f}  sparsity {now.sparsity:6.1%}")

    start = time.perf_counter()
    model = perceptron(data, hidden, recipe.seed)
    masks: pruning.MaskSet | None = None
    report: pruning.SparsityReport | None = None
    history: list[dict[str, float]] = []
    pairs = (data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)
    with _one_thread():
        for phase in _phases(recipe, progress):
            result = phase.fit(model, *pairs)
            masks, report = result.masks, result.report
            done = {key: history[-1][key] if history else 0 for key in ("step", "epoch")}
            history += [{**row, **{k: row[k] + done[k] for k in done}} for row in result.history]
    if recipe.method == "one-shot" and not recipe.finetune_epochs:
        masks = pruning.prune(model, recipe.sparsity, scope=recipe.scope)
        report = pruning.SparsityReport.of(model, masks)
    model.eval()
    with torch.no_grad():
        wrong = int((model(data.test_inputs).argmax(1) != data.test_labels).sum())
    return Run(
        name=name,
        recipe=recipe,
        model=model,
        masks=masks,
        report=report,
        history=history,
        trace=trace,
        accuracy=1 - wrong / len(data.test_labels),
        wrong=wrong,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads would add up gradients in another order, and gain little on small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _phases(
    recipe: Recipe, progress: Callable[[pruning.Progress], None]
) -> list[pruning.ProgressiveMagnitude]:
    """The training runs of a method, one after the other."""
    config = pruning.TrainConfig(
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device="cpu",
    )
    if recipe.method in ("dense", "one-shot"):
        phases = [pruning.ProgressiveMagnitude(None, config, progress=progress)]
        if recipe.method == "one-shot" and recipe.finetune_epochs:
            gentle = replace(config, epochs=recipe.finetune_epochs, lr=FINETUNE_LR * recipe.lr)
            phases.append(
                pruning.ProgressiveMagnitude(
                    recipe.sparsity,
                    gentle,
                    schedule=pruning.OneShot(recipe.sparsity),
                    scope=recipe.scope,
                    progress=progress,
                )
            )
        return phases
    return [
        pruning.ProgressiveMagnitude(
            recipe.sparsity,
            config,
            schedule="cubic" if recipe.method == "cubic" else "linear",
            scope=recipe.scope,
            t1=recipe.t1,
            every=recipe.every,
            progress=progress,
        )
    ]


def as_data(run: Run) -> dict[str, Any]:
    """The figures of a run as plain data for a JSON report."""
    return {
        "accuracy": run.accuracy,
        "wrong": run.wrong,
        "sparsity": run.zeros,
        "seconds": run.seconds,
        "recipe": asdict(run.recipe),
        "history": run.history,
        "masks_digest": None if run.masks is None else run.masks.digest(),
        "sparsity_report": None if run.report is None else json.loads(run.report.to_json()),
    }
