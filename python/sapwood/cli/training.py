"""How the command line trains: one network, one recipe, one method."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import pruning
from sapwood.cli import methods
from sapwood.cli.methods import Recipe
from sapwood.data import Dataset
from sapwood.pruning import MaskSet, Progress, PruningResult

#: Sees every step; raises KeyboardInterrupt to stop the run there.
Observer = Callable[[Progress], None]


@dataclass(frozen=True)
class Run:
    """One trained network and how it came about."""

    recipe: Recipe
    sparsity: float  # wanted
    model: nn.Module  # where a method meets several sparsities, as the last one left it
    masks: MaskSet | None  # None: dense
    report: pruning.SparsityReport | None
    history: list[dict[str, float]]  # one row per epoch
    accuracy: float  # on the test set
    wrong: int
    steps: int
    seconds: float
    left_zero: int | None  # masked weights that were not +0.0 later on; None: not known

    @property
    def zeros(self) -> float:
        """Share of the prunable weights that are off."""
        return 0.0 if self.masks is None else self.masks.sparsity()


class ZeroWatch:
    """Counts masked weights that are not +0.0, bit for bit, after the masks have become final."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self._recipe = recipe
        self._weights = {n: model.get_parameter(n).detach() for n in MaskSet.dense(model)}
        self._seen: dict[str, dict[str, Tensor]] = {}  # stage -> name -> all bits that were set

    def __call__(self, now: Progress) -> None:
        final = methods.masks_final_after(self._recipe, now.total)
        if final is None or now.step <= final or now.stage.startswith("round 0 "):
            return
        stage = self._seen.setdefault(now.stage, {})
        for name, weight in self._weights.items():
            bits = weight.view(torch.int32)
            if name in stage:
                stage[name] |= bits
            else:
                stage[name] = bits.clone()

    def count(self, result: PruningResult) -> int | None:
        """The count of a stage, given its final masks; None when no step of it was seen."""
        seen = self._seen.get(result.stage)
        if seen is None or result.masks is None:
            return None
        masks = result.masks.items()
        return sum(int(seen[name][~mask].count_nonzero()) for name, mask in masks)


def train(
    recipe: Recipe,
    data: Dataset,
    model: nn.Module,
    *,
    observers: Sequence[Observer] = (),
    like: MaskSet | None = None,
    trained: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> list[Run]:
    """Trains one network by one method, on ``recipe.threads`` threads.

    The outcome depends on the arguments alone. Recipes that differ in method and sparsity only see
    the same batches.

    Args:
        recipe: what decides the outcome.
        data: to learn and to test on.
        model: changed in place and left in evaluation mode.
        observers: called after every step, in order.
        like: see ``methods.build``.
        trained: see ``methods.build``.
        checkpoint: a folder for what an interrupted run needs to go on.
        checkpoint_every: steps between two writings; default: an epoch.
        resume: go on from that folder.

    Returns:
        One run per wanted sparsity, the recipe's own last.
    """
    watch = ZeroWatch(recipe, model)

    def progress(now: Progress) -> None:
        watch(now)
        for observer in observers:
            observer(now)

    options: dict[str, Any] = {
        "progress": progress,
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "resume": resume,
    }
    pairs = (data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)
    built = methods.build(recipe, like=like, trained=trained, **options)
    with _threads(recipe.threads):
        chains = methods.fit(built, model, *pairs)
    model.eval()
    wanted = (*recipe.through, recipe.sparsity)
    images = len(data.test_labels)
    return [
        as_run(recipe, sparsity, chain, images, watch.count(chain[-1]))
        for sparsity, chain in zip(wanted, chains, strict=True)
    ]


def cut(recipe: Recipe, data: Dataset, model: nn.Module) -> Run:
    """Cuts a trained network at once; nothing is trained."""
    start = time.perf_counter()
    masks = pruning.prune(model, recipe.sparsity, scope=recipe.scope)
    with _threads(recipe.threads):
        wrong = _wrong(model, data)
    images = len(data.test_labels)
    return Run(
        recipe=recipe,
        sparsity=recipe.sparsity,
        model=model,
        masks=masks,
        report=pruning.SparsityReport.of(model, masks),
        history=[],
        accuracy=1 - wrong / images,
        wrong=wrong,
        steps=0,
        seconds=time.perf_counter() - start,
        left_zero=None,
    )


def _wrong(model: nn.Module, data: Dataset) -> int:
    """Test images whose largest output is another class."""
    model.eval()
    batches = zip(data.test_inputs.split(512), data.test_labels.split(512), strict=True)
    with torch.no_grad():
        return sum(int((model(x).argmax(1) != y).sum()) for x, y in batches)


def as_run(
    recipe: Recipe,
    sparsity: float,
    chain: Sequence[PruningResult],
    images: int,
    left_zero: int | None,
) -> Run:
    """The figures of a chain of stages; ``images`` are in the test set."""
    last = chain[-1]
    wrong = round((1 - last.metric) * images)
    return Run(
        recipe=recipe,
        sparsity=sparsity,
        model=last.model,
        masks=last.masks,
        report=last.report,
        history=_joined(chain),
        accuracy=1 - wrong / images,
        wrong=wrong,
        steps=sum(result.steps for result in chain),
        seconds=sum(result.wall_s for result in chain),
        left_zero=left_zero,
    )


def _joined(chain: Sequence[PruningResult]) -> list[dict[str, float]]:
    """The rows of all stages, steps and epochs counted on."""
    history: list[dict[str, float]] = []
    for result in chain:
        done = {key: history[-1][key] if history else 0 for key in ("step", "epoch")}
        history += [{**row, **{k: row[k] + done[k] for k in done}} for row in result.history]
    return history


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Another number of threads would add up gradients in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _number(value: float) -> float | None:
    """JSON has no NaN: a stage without training has no loss."""
    return None if math.isnan(value) else value


def as_data(run: Run) -> dict[str, Any]:
    """The figures of a run as plain data for a JSON report."""
    data: dict[str, Any] = {
        "accuracy": run.accuracy,
        "wrong": run.wrong,
        "sparsity": run.zeros,
        "steps": run.steps,
        "seconds": run.seconds,
        "recipe": asdict(run.recipe),
        "history": [{k: _number(v) for k, v in row.items()} for row in run.history],
        "masks_digest": None if run.masks is None else run.masks.digest(),
        "sparsity_report": None if run.report is None else json.loads(run.report.to_json()),
    }
    if run.report is not None:
        data |= {
            "zeros": run.report.prunable - sum(t.kept for t in run.report.tensors),
            "zeros_expected": methods.expected_zeros(run.sparsity, run.report.prunable),
            "masks_and_weights_agree": run.report.consistent,
            "left_zero_after_last_update": run.left_zero,
        }
    return data
