"""Recipes: from a model and data to a pruned model in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sapwood.pruning._names import NamedParameters, Rule
from sapwood.pruning._stages import describe_rule, describe_schedule, describe_scope
from sapwood.pruning.allocation import LayerPlan, require_sparsity
from sapwood.pruning.criteria import Criterion, ranks_absolute_weights, resolve_criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.recipe import RecipeOptions, TrainingRecipe
from sapwood.pruning.schedules import Cubic, Linear, Position, Schedule
from sapwood.pruning.select import select
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ProgressiveMagnitude", "prune"]

_SCHEDULES: dict[str, type[Linear] | type[Cubic]] = {"linear": Linear, "cubic": Cubic}
_MOST_STEPS_BETWEEN_UPDATES = 100


def prune(
    model: nn.Module,
    sparsity: float,
    criterion: str | Criterion = "magnitude",
    *,
    scope: str | LayerPlan = "global",
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    include: Sequence[Rule] | None = None,
    exclude: Sequence[Rule] | None = None,
    granularity: str = "element",
    n_m: tuple[int, int] | None = None,
    on_misfit: str = "raise",
    min_keep_per_layer: int = 1,
    min_keep_per_unit: int = 0,
    masks: MaskSet | None = None,
    inplace: bool = True,
) -> MaskSet:
    """Cuts a model to a sparsity at once.

    Example:
        >>> import torch
        >>> from sapwood.pruning import prune
        >>> model = torch.nn.Linear(10, 10)
        >>> masks = prune(model, 0.9)
        >>> int((model.weight != 0).sum())
        10

    Args:
        model: the model.
        sparsity: share of the prunable elements to switch off, in [0, 1).
        criterion: name or object; high scores are kept.
        scope: ``"global"``, ``"layer"``, ``"erk"`` or a ``LayerPlan``; see ``select``.
        batch: for criteria that need data.
        loss_fn: for criteria that need a loss.
        include: which parameters; see ``MaskSet.dense``.
        exclude: which not.
        granularity: what goes as one: ``"element"``, ``"n:m"`` or ``"row"``; see ``select``.
        n_m: (n, m) for granularity ``"n:m"``; the sparsity must then be 1 - n / m.
        on_misfit: see ``select``.
        min_keep_per_layer: elements that every tensor keeps.
        min_keep_per_unit: elements that every output row keeps.
        masks: what is off already and stays off; it then says which parameters, instead of
            ``include`` and ``exclude``.
        inplace: zero the weights; False only returns the masks.

    Returns:
        The masks.

    Raises:
        MaskMatchError: if a rule matches nothing, or a mask has no parameter.
        ValueError: if the sparsity is not finite, outside [0, 1) or unreachable, a weight is NaN,
            the criterion needs data and there is none, or there are both masks and rules.
        TypeError: if an argument has another type.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks,
        arXiv:1506.02626, for the magnitude criterion.
    """
    where = "sapwood.pruning.prune"
    require_sparsity(sparsity, where)
    rule = resolve_criterion(criterion, where)
    if rule.needs_data and batch is None:
        raise ValueError(f"{where}: batch must be given for {type(rule).__name__}, got None")
    if masks is None:
        masks = MaskSet.dense(model, include, exclude)
    elif include is not None or exclude is not None:
        raise ValueError(f"{where}: include and exclude must be None with masks, got rules")
    absolute = ranks_absolute_weights(rule)
    if absolute:  # the weights themselves, without a copy
        found = masks.parameters_of(NamedParameters.of(model), True, where)
        scores = {name: parameter.detach() for name, parameter in found.items()}
    else:
        scores = rule.scores(model, masks, batch, loss_fn)
    chosen = select(
        scores,
        masks,
        sparsity,
        scope=scope,
        absolute=absolute,
        granularity=granularity,
        n_m=n_m,
        on_misfit=on_misfit,
        min_keep_per_layer=min_keep_per_layer,
        min_keep_per_unit=min_keep_per_unit,
    )
    if inplace:
        chosen.apply_(model)
    return chosen


class ProgressiveMagnitude(TrainingRecipe):
    """Progressive magnitude pruning: one training run that ends sparse.

    The sparsity rises along the schedule while the network trains; what is small by then goes, the
    rest adapts. With ``sparsity=None`` the same code trains densely, as the baseline.

    Example:
        >>> import torch
        >>> from sapwood.pruning import ProgressiveMagnitude, TrainConfig
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> recipe = ProgressiveMagnitude(0.5, TrainConfig(epochs=4, batch_size=16))
        >>> result = recipe.fit(torch.nn.Linear(8, 2), data, data)
        >>> result.report.sparsity_by_weight
        0.5

    Args:
        sparsity: final sparsity in [0, 1), or None for dense training.
        train: how to train.
        schedule: ``"linear"`` (the published shape), ``"cubic"`` (recommended for short runs), or
            a schedule of your own, whose sparsity then counts.
        scope: ``"global"``, ``"layer"``, ``"erk"`` or a ``LayerPlan``; see ``select``.
        criterion: name or object.
        t0: first step of the schedule, or a fraction of all steps.
        t1: last update, as a step or a fraction; late enough to use the training, early enough to
            recover before the learning rate is gone.
        every: steps between updates; default: one epoch, at most 100.
        monotone: masked weights never return; default: what the schedule says.
        options: see ``Recipe``: rules, loss, metric, progress, checkpoint and resume.

    Raises:
        ValueError: if the sparsity is not finite or outside [0, 1), or the schedule is unknown.
        TypeError: if there is an unknown option.

    References:
        Our implementation of progressive magnitude pruning, arXiv:2606.12278, of which the
        abstract was read; the defaults are ours.
    """

    def __init__(
        self,
        sparsity: float | None,
        train: TrainConfig | None = None,
        *,
        schedule: str | Schedule = "linear",
        scope: str | LayerPlan = "global",
        criterion: str | Criterion = "magnitude",
        t0: Position = 0,
        t1: Position = 0.75,
        every: int | None = None,
        monotone: bool | None = None,
        **options: Unpack[RecipeOptions],
    ) -> None:
        super().__init__(train, **options)
        if sparsity is not None:
            require_sparsity(sparsity, self._where)
        if not isinstance(schedule, Schedule) and schedule not in _SCHEDULES:
            raise ValueError(
                f"{self._where}: schedule must be one of {sorted(_SCHEDULES)} or a Schedule, "
                f"got {schedule!r}"
            )
        self.sparsity = sparsity
        self.schedule = schedule
        self.scope = scope
        self.criterion = criterion
        self.t0 = t0
        self.t1 = t1
        self.every = every
        self.monotone = monotone

    def _pruner(
        self, model: nn.Module, train: Data, total_steps: int, epoch_steps: int
    ) -> Pruner | None:
        if self.sparsity is None:
            return None
        return Pruner(
            model,
            self._schedule(self.sparsity, epoch_steps),
            self.criterion,
            scope=self.scope,
            include=self.include,
            exclude=self.exclude,
            monotone=self.monotone,
            **self.selection,
            total_steps=total_steps,
            seed=self.train.seed,
        )

    def _schedule(self, sparsity: float, epoch_steps: int) -> Schedule:
        if isinstance(self.schedule, Schedule):
            return self.schedule
        every = self.every or min(epoch_steps, _MOST_STEPS_BETWEEN_UPDATES)
        return _SCHEDULES[self.schedule](sparsity, t0=self.t0, t1=self.t1, every=every)

    def _describe(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "schedule": describe_schedule(self.schedule),
            "scope": describe_scope(self.scope),
            "criterion": describe_rule(self.criterion),
            "t0": self.t0,
            "t1": self.t1,
            "every": self.every,
            "monotone": self.monotone,
        }
