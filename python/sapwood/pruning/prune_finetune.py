"""Train, cut and fine-tune, with three ways to go on after a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sapwood.pruning._scoring import scoring_batch
from sapwood.pruning._session import Start
from sapwood.pruning._stages import Stages, describe_rule, describe_scope, holding
from sapwood.pruning.allocation import LayerPlan, require_sparsity
from sapwood.pruning.criteria import Criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.recipe import Recipe, RecipeOptions
from sapwood.pruning.recipes import prune
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data, PruningResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PruneFinetuneConfig", "TrainPruneFinetune"]


@dataclass(frozen=True)
class PruneFinetuneConfig:
    """How to train, cut and fine-tune.

    Example:
        >>> from sapwood.pruning import PruneFinetuneConfig, TrainConfig
        >>> PruneFinetuneConfig(prune_steps=(0.5, 0.9), finetune=TrainConfig(epochs=2)).rewind
        'lr'

    Args:
        train: the dense training; None for a model that is trained already.
        prune_steps: the rising sparsities of the cuts, each in (0, 1).
        criterion: name or object; high scores are kept.
        scope: ``"global"``, ``"layer"``, ``"erk"`` or a ``LayerPlan``; see ``select``.
        finetune: the training after every cut; None only cuts.
        rewind: ``"none"`` follows the learning rates of ``finetune``; ``"lr"`` replays the last
            ``finetune.epochs`` epochs of those of ``train``; ``"weights"`` also sets the survivors
            back to their values at ``rewind_step`` and replays the data and the learning rates
            from there, to the end.
        rewind_step: the step of ``train`` that ``"weights"`` returns to.

    Raises:
        ValueError: if a value is outside its range, or rewinding lacks what it rewinds.

    References:
        Renda et al., Comparing Rewinding and Fine-tuning in Neural Network Pruning,
        arXiv:2003.02389, for the three ways.
    """

    train: TrainConfig | None = field(default_factory=TrainConfig)
    prune_steps: Sequence[float] = (0.9,)
    criterion: str | Criterion = "magnitude"
    scope: str | LayerPlan = "global"
    finetune: TrainConfig | None = field(default_factory=lambda: TrainConfig(epochs=2))
    rewind: Literal["none", "lr", "weights"] = "lr"
    rewind_step: int = 0

    def __post_init__(self) -> None:
        where = "sapwood.pruning.PruneFinetuneConfig"
        steps = [require_sparsity(value, where, "prune_steps") for value in self.prune_steps]
        if not steps or any(a >= b for a, b in pairwise([0.0, *steps])):
            raise ValueError(
                f"{where}: prune_steps must be positive and rise, got {self.prune_steps}"
            )
        if self.rewind not in ("none", "lr", "weights"):
            raise ValueError(
                f"{where}: rewind must be 'none', 'lr' or 'weights', got {self.rewind!r}"
            )
        if self.finetune is None or self.rewind == "none":
            return
        if self.train is None:
            raise ValueError(f"{where}: rewind must be 'none' without train, got {self.rewind!r}")
        if self.rewind == "lr" and self.finetune.epochs > self.train.epochs:
            raise ValueError(
                f"{where}: finetune must have at most the {self.train.epochs} epochs of train "
                f"with rewind='lr', got {self.finetune.epochs}"
            )
        if self.rewind_step < 0:
            raise ValueError(f"{where}: rewind_step must be at least 0, got {self.rewind_step}")


class TrainPruneFinetune(Recipe):
    """The classical pipeline: train densely, cut, fine-tune; once or in several cuts.

    Example:
        >>> import torch
        >>> from sapwood.pruning import PruneFinetuneConfig, TrainConfig, TrainPruneFinetune
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> train = TrainConfig(epochs=2, batch_size=16)
        >>> recipe = TrainPruneFinetune(PruneFinetuneConfig(train, (0.25, 0.5), finetune=train))
        >>> recipe.fit(torch.nn.Linear(8, 2), data, data).report.sparsity_by_weight
        0.5
        >>> [result.stage for result in recipe.results_]
        ['train', 'finetune 25 %', 'finetune 50 %']

    Args:
        config: how to train, cut and fine-tune.
        options: see ``Recipe``: rules, loss, metric, progress, checkpoint and resume.

    Raises:
        TypeError: if there is an unknown option.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks,
        arXiv:1506.02626; for the rewinding see ``PruneFinetuneConfig``.
    """

    def __init__(
        self, config: PruneFinetuneConfig | None = None, **options: Unpack[RecipeOptions]
    ) -> None:
        self.config = config or PruneFinetuneConfig()
        super().__init__(self.config.train or self.config.finetune, **options)

    def fit(self, model: nn.Module, train: Any, val: Any) -> PruningResult:
        """Trains, cuts and fine-tunes the model in place, on the configured device.

        Args:
            model: the model, freshly initialised, or trained when ``config.train`` is None.
            train: a DataLoader of (X, y), or a pair of tensors X: (rows, ...), y: (rows, ...).
            val: the same, for the metric after each epoch.

        Returns:
            The result of the last stage, also kept as ``result_``; ``results_`` holds all of them.

        Raises:
            ValueError: if the data are empty or differ in length, a weight becomes NaN, or the
                checkpoint is of another run.
            TypeError: if the data are neither a loader nor a pair.
            MaskMatchError: if a rule matches nothing.
        """
        stages = self._open(model, train, val)
        point = stages.rewind_point(self.config.rewind_step)
        results = []
        if self.config.train is not None:
            after = point.after_step if self.config.rewind_step else None
            results.append(stages.run("train", lambda *_, **__: None, after_step=after))
        masks = None
        for sparsity in self.config.prune_steps:
            masks = self._masks(model, masks, sparsity, train)
            if self.config.finetune is None:
                results.append(stages.cut(f"cut {_percent(sparsity)}", masks))
                continue
            config, start = self._finetuning(stages, point.start)
            back = partial(point.restore, model) if self.config.rewind == "weights" else None
            name = f"finetune {_percent(sparsity)}"
            results.append(
                stages.run(name, holding(masks), config=config, prepare=back, start=start)
            )
        self.results_ = results
        return self._finish(results[-1])

    def _masks(
        self, model: nn.Module, masks: MaskSet | None, sparsity: float, train: Data
    ) -> MaskSet:
        """The next cut; what is off already stays off."""
        return prune(
            model,
            sparsity,
            self.config.criterion,
            scope=self.config.scope,
            batch=scoring_batch(self.config.criterion, train, self.train, self._where),
            loss_fn=self.loss_fn,
            include=self.include if masks is None else None,
            exclude=self.exclude if masks is None else None,
            **self.selection,
            masks=masks,
            inplace=False,
        )

    def _finetuning(self, stages: Stages, point: Start) -> tuple[TrainConfig, Start | None]:
        """How a fine-tuning stage trains, and where on the clock of that training it begins."""
        train, finetune = self.config.train, self.config.finetune
        assert finetune is not None
        if self.config.rewind == "none" or train is None:
            return finetune, None
        if self.config.rewind == "weights":
            return train, point
        return train, Start(stages.per_epoch * (train.epochs - finetune.epochs))

    def _describe(self) -> dict[str, Any]:
        finetune = self.config.finetune
        return {
            "prune_steps": list(self.config.prune_steps),
            "criterion": describe_rule(self.config.criterion),
            "scope": describe_scope(self.config.scope),
            "finetune": None if finetune is None else asdict(finetune),
            "rewind": self.config.rewind,
            "rewind_step": self.config.rewind_step,
        }


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
