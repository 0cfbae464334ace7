"""The methods to compare with that train once: prune before training, or move the masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sapwood.pruning._scoring import scoring_batch
from sapwood.pruning._stages import describe_rule, describe_scope
from sapwood.pruning.allocation import LayerPlan, require_sparsity
from sapwood.pruning.criteria import Criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.recipe import RecipeOptions, TrainingRecipe
from sapwood.pruning.recipes import prune
from sapwood.pruning.rigl import RigL
from sapwood.pruning.schedules import Constant
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DynamicSparseTraining", "PruneAtInit"]


class PruneAtInit(TrainingRecipe):
    """Prune before training, then train what is left: SNIP, GraSP, magnitude or random.

    Example:
        >>> import torch
        >>> from sapwood.pruning import PruneAtInit, TrainConfig
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> recipe = PruneAtInit(0.5, TrainConfig(epochs=4, batch_size=16), criterion="snip")
        >>> recipe.fit(torch.nn.Linear(8, 2), data, data).report.sparsity_by_weight
        0.5

    Args:
        sparsity: sparsity in [0, 1).
        train: how to train.
        criterion: name or object. Those that need data get one batch of ``train.batch_size`` rows
            (GraSP: a class-balanced one), drawn with ``train.seed``.
        scope: ``"global"``, ``"layer"``, ``"erk"`` or a ``LayerPlan``; see ``select``. For a random
            control of another method take ``LayerPlan.like(masks)`` of its masks.
        options: see ``Recipe``: rules, loss, metric, progress, checkpoint and resume.

    Raises:
        ValueError: if the sparsity is not finite or outside [0, 1).
        TypeError: if there is an unknown option.

    References:
        Lee et al., SNIP, arXiv:1810.02340; Wang et al., Picking Winning Tickets Before Training by
        Preserving Gradient Flow, arXiv:2002.07376.
    """

    def __init__(
        self,
        sparsity: float,
        train: TrainConfig | None = None,
        *,
        criterion: str | Criterion = "snip",
        scope: str | LayerPlan = "global",
        **options: Unpack[RecipeOptions],
    ) -> None:
        super().__init__(train, **options)
        self.sparsity = require_sparsity(sparsity, self._where)
        self.criterion = criterion
        self.scope = scope

    def _pruner(self, model: nn.Module, train: Data, total_steps: int, epoch_steps: int) -> Pruner:
        masks = prune(
            model,
            self.sparsity,
            self.criterion,
            scope=self.scope,
            batch=scoring_batch(self.criterion, train, self.train, self._where),
            loss_fn=self.loss_fn,
            include=self.include,
            exclude=self.exclude,
            **self.selection,
            inplace=False,
        )
        return Pruner(model, Constant(masks.sparsity()), masks=masks)

    def _describe(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "criterion": describe_rule(self.criterion),
            "scope": describe_scope(self.scope),
        }


class DynamicSparseTraining(TrainingRecipe):
    """RigL: training at a fixed sparsity, with masks that move to where the gradients are.

    Example:
        >>> import torch
        >>> from sapwood.pruning import DynamicSparseTraining, TrainConfig
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> recipe = DynamicSparseTraining(0.5, TrainConfig(epochs=4, batch_size=16), every=2)
        >>> recipe.fit(torch.nn.Linear(8, 2), data, data).report.sparsity_by_mask
        0.5

    Args:
        sparsity: sparsity in [0, 1), from the first step to the last.
        train: how to train.
        init: ``"erk"``, ``"uniform"``, a ``LayerPlan`` or a ``MaskSet``; see ``RigL``.
        every: steps between updates.
        alpha: share of the active weights that move at the first update.
        t_end: part of the training after which the masks are fixed.
        grow: ``"gradient"`` (RigL) or ``"random"`` (SET).
        options: see ``Recipe``: rules, loss, metric, progress, checkpoint and resume.

    Raises:
        ValueError: if the sparsity is not finite or outside [0, 1).
        TypeError: if there is an unknown option.
        NotImplementedError: for another granularity than single weights.

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134.
    """

    def __init__(
        self,
        sparsity: float,
        train: TrainConfig | None = None,
        *,
        init: str | LayerPlan | MaskSet = "erk",
        every: int = 100,
        alpha: float = 0.3,
        t_end: float = 0.75,
        grow: Literal["gradient", "random"] = "gradient",
        **options: Unpack[RecipeOptions],
    ) -> None:
        super().__init__(train, **options)
        if self.selection["granularity"] != "element" or self.selection["min_keep_per_unit"]:
            raise NotImplementedError(
                f"{self._where}: granularity must be 'element' and min_keep_per_unit 0, since RigL "
                f"moves single weights, got {self.selection['granularity']!r} and "
                f"{self.selection['min_keep_per_unit']}; ProgressiveMagnitude prunes rows"
            )
        self.sparsity = require_sparsity(sparsity, self._where)
        self.init = init
        self.every = every
        self.alpha = alpha
        self.t_end = t_end
        self.grow = grow

    def _pruner(self, model: nn.Module, train: Data, total_steps: int, epoch_steps: int) -> Pruner:
        return RigL(
            model,
            self.sparsity,
            init=self.init,
            every=self.every,
            alpha=self.alpha,
            t_end=self.t_end,
            total_steps=total_steps,
            grow=self.grow,
            include=self.include,
            exclude=self.exclude,
            min_keep_per_layer=self.selection["min_keep_per_layer"],
            seed=self.train.seed,
        )

    def _describe(self) -> dict[str, Any]:
        init = self.init.digest() if isinstance(self.init, MaskSet) else describe_scope(self.init)
        knobs = {"every": self.every, "alpha": self.alpha, "t_end": self.t_end, "grow": self.grow}
        return {"sparsity": self.sparsity, "init": init, **knobs}
