"""From a method's name to the recipe of the library, and what the method costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sapwood import pruning
from sapwood.pruning import (
    DynamicSparseTraining,
    LayerPlan,
    LotteryTicket,
    MaskSet,
    Progress,
    PruneAtInit,
    PruneFinetuneConfig,
    PruningResult,
    TrainConfig,
    TrainPruneFinetune,
)

FINETUNE_LR = 0.1  # of the learning rate before the cut
RIGL_EVERY = 2  # times the steps between cuts: the usual 100 steps with 50 between cuts
RIGL_END = 0.75  # part of the training after which RigL's masks are fixed


@dataclass(frozen=True)
class Recipe:
    """All that decides the outcome of a training run, beside network and data."""

    method: str  # a key of ``choices.METHODS``
    sparsity: float
    epochs: int
    lr: float
    batch_size: int
    seed: int
    weight_decay: float = 1e-4
    scope: str = "global"
    t1: float = 0.75  # part of the steps after which the masks are fixed
    every: int = 10  # steps between cuts
    finetune_epochs: int = 2
    threads: int = 1
    through: tuple[float, ...] = ()  # with lth: lower sparsities to meet on the way

    @property
    def config(self) -> TrainConfig:
        """How every training of this recipe goes."""
        return TrainConfig(
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            seed=self.seed,
            device="cpu",
        )


def build(
    recipe: Recipe, *, like: MaskSet | None = None, trained: bool = False, **options: Any
) -> pruning.Recipe:
    """The library's recipe.

    Args:
        recipe: what the command line asked for.
        like: with ``random``, masks whose number of kept weights per tensor is taken, instead of a
            scope.
        trained: with ``finetune``, whether the dense training is over already.
        options: those that all recipes of the library take.
    """
    method, sparsity, config = recipe.method, recipe.sparsity, recipe.config
    if method == "dense":
        return pruning.ProgressiveMagnitude(None, config, **options)
    if method in ("progressive", "cubic"):
        return pruning.ProgressiveMagnitude(
            sparsity,
            config,
            schedule="cubic" if method == "cubic" else "linear",
            scope=recipe.scope,
            t1=recipe.t1,
            every=recipe.every,
            **options,
        )
    if method in ("one-shot", "finetune"):
        return _train_prune_finetune(recipe, trained, **options)
    if method == "lth":
        wanted = (*recipe.through, sparsity)
        return LotteryTicket(wanted, config, scope=recipe.scope, **options)
    if method == "rigl":
        init = "uniform" if recipe.scope == "layer" else recipe.scope
        every = RIGL_EVERY * recipe.every
        return DynamicSparseTraining(
            sparsity, config, init=init, every=every, t_end=RIGL_END, **options
        )
    criterion = pruning.Random(recipe.seed) if method == "random" else method
    scope: str | LayerPlan = recipe.scope
    if like is not None:
        scope = LayerPlan.like(like)
        options["min_keep_per_layer"] = 0  # the other's counts, whatever they are
    return PruneAtInit(sparsity, config, criterion=criterion, scope=scope, **options)


def _train_prune_finetune(recipe: Recipe, trained: bool, **options: Any) -> TrainPruneFinetune:
    gentle = replace(
        recipe.config, epochs=recipe.finetune_epochs, lr=FINETUNE_LR * recipe.config.lr
    )
    config = PruneFinetuneConfig(
        None if trained else recipe.config,
        (recipe.sparsity,),
        scope=recipe.scope,
        finetune=gentle if recipe.method == "finetune" else None,
        rewind="none",
    )
    return TrainPruneFinetune(config, **options)


def fit(
    recipe: pruning.Recipe, model: nn.Module, train: Any, val: Any
) -> list[list[PruningResult]]:
    """Runs a recipe; for each wanted sparsity, the stages that led to it."""
    outcome = recipe.fit(model, train, val)  # type: ignore[attr-defined]
    if isinstance(recipe, LotteryTicket):
        ends = [recipe.sparsities().index(wanted) + 1 for wanted in recipe.sparsity]
        return [outcome[: end + 1] for end in ends]
    if isinstance(recipe, TrainPruneFinetune):
        return [recipe.results_]
    return [[outcome]]


def masks_final_after(recipe: Recipe, total: int) -> int | None:
    """The step of a stage's ``total`` after which its masks are fixed; None without masks."""
    if recipe.method in ("progressive", "cubic"):
        return round(recipe.t1 * total)
    if recipe.method == "rigl":
        return math.ceil(RIGL_END * total)
    return None if recipe.method in ("dense", "one-shot") else 0


def position(recipe: Recipe, now: Progress) -> tuple[int, int]:
    """Steps done and to do over all stages of a method, from where one stage stands."""
    rounds = re.fullmatch(r"round (\d+) of (\d+)", now.stage)
    if rounds:
        return now.total * int(rounds[1]) + now.step, now.total * (int(rounds[2]) + 1)
    if recipe.method != "finetune":
        return now.step, now.total
    first = now.stage == "train"
    per_epoch = now.total // (recipe.epochs if first else recipe.finetune_epochs)
    done = now.step if first else now.step + per_epoch * recipe.epochs
    return done, per_epoch * (recipe.epochs + recipe.finetune_epochs)


def epochs(recipe: Recipe) -> int:
    """Passes over the data until the recipe is done."""
    if recipe.method == "lth":
        rounds = LotteryTicket((*recipe.through, recipe.sparsity)).sparsities()
        return recipe.epochs * (len(rounds) + 1)
    return recipe.epochs + (recipe.finetune_epochs if recipe.method == "finetune" else 0)


def expected_zeros(sparsity: float, elements: int) -> int:
    """How many weights must be off; the library rounds half to even, as Python does."""
    return round(sparsity * elements)
