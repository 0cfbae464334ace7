"""The lottery ticket: train, cut the survivors, rewind, and train again, round after round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from sapwood.pruning._stages import RewindPoint, Stages, describe_rule, holding
from sapwood.pruning.allocation import LayerPlan, require_sparsity
from sapwood.pruning.criteria import Criterion, resolve_criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.recipe import Recipe, RecipeOptions
from sapwood.pruning.schedules import Iterative
from sapwood.pruning.select import select
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import PruningResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LotteryTicket"]

SCOPES = ("layer", "global")


class LotteryTicket(Recipe):
    """Iterative magnitude pruning with rewinding: sparse networks that train from their own start.

    Round 0 trains the dense network. Each further round cuts a share of the surviving weights by
    their size after training, sets the survivors back to their values at ``rewind_step`` and
    trains again. A run of r rounds costs r + 1 trainings.

    Example:
        >>> import torch
        >>> from sapwood.pruning import LotteryTicket, TrainConfig
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> recipe = LotteryTicket(0.5, TrainConfig(epochs=2, batch_size=16), rate=0.3)
        >>> results = recipe.fit(torch.nn.Linear(8, 2), data, data)
        >>> [round(result.report.sparsity_by_mask, 4) for result in results[1:]]
        [0.3125, 0.5]

    Args:
        sparsity: final sparsity in (0, 1); or a rising list of them, each of which is reached
            exactly at the end of some round.
        train: how to train in every round.
        rate: share of the survivors to cut per round, at most; a round that would overshoot a
            wanted sparsity cuts less.
        scope: ``"layer"`` cuts by tensor, ``"global"`` ranks all tensors together.
        output_factor: with ``"layer"``, the share of the last tensor's survivors that goes,
            relative to the others.
        rewind_step: the step of round 0 whose weights the survivors return to. 0 is the
            initialisation; deep residual networks want 0.1 to 7 % of the training. Later rounds
            see the data, and the learning rate, from that step on.
        criterion: name or object; high scores are kept.
        options: see ``Recipe``: rules, loss, metric, progress, checkpoint and resume.

    Raises:
        ValueError: if an argument is outside its range.
        TypeError: if there is an unknown option.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635: iterative pruning,
        per tensor, the output layer at half the rate. Frankle et al., Linear Mode Connectivity and
        the Lottery Ticket Hypothesis, arXiv:1912.05671: rewinding to a later step. The exact
        counts, and rounds that meet wanted sparsities, are ours.
    """

    def __init__(
        self,
        sparsity: float | Sequence[float],
        train: TrainConfig | None = None,
        *,
        rate: float = 0.2,
        scope: str = "layer",
        output_factor: float = 0.5,
        rewind_step: int = 0,
        criterion: str | Criterion = "magnitude",
        **options: Unpack[RecipeOptions],
    ) -> None:
        super().__init__(train, **options)
        wanted = [sparsity] if isinstance(sparsity, (int, float)) else list(sparsity)
        for value in wanted:
            require_sparsity(value, self._where)
        if not wanted or any(a >= b for a, b in pairwise([0.0, *wanted])):
            raise ValueError(f"{self._where}: sparsity must be positive and rise, got {sparsity}")
        if not 0.0 < rate < 1.0:
            raise ValueError(f"{self._where}: rate must be in (0, 1), got {rate}")
        if scope not in SCOPES:
            raise ValueError(f"{self._where}: scope must be one of {SCOPES}, got {scope!r}")
        if not 0.0 <= output_factor <= 1.0:
            raise ValueError(f"{self._where}: output_factor must be in [0, 1], got {output_factor}")
        if isinstance(rewind_step, bool) or not isinstance(rewind_step, int) or rewind_step < 0:
            raise ValueError(f"{self._where}: rewind_step must be at least 0, got {rewind_step!r}")
        self.sparsity = tuple(float(value) for value in wanted)
        self.rate = rate
        self.scope = scope
        self.output_factor = output_factor
        self.rewind_step = rewind_step
        self.criterion = criterion

    def sparsities(self) -> list[float]:
        """The sparsity of every round after the dense one."""
        return list(_ladder(self.sparsity, self.rate))

    def fit(self, model: nn.Module, train: Any, val: Any) -> list[PruningResult]:
        """Trains all rounds in place, on the configured device.

        Args:
            model: the model, freshly initialised.
            train: a DataLoader of (X, y), or a pair of tensors X: (rows, ...), y: (rows, ...).
            val: the same, for the metric after each epoch.

        Returns:
            One result per round, the dense one first; all share the model, which is left as the
            last round trained it. Also kept as ``results_``; ``result_``, ``model_`` and
            ``masks_`` are those of the last round, ``rewind_weights_`` the state dict that the
            masks belong to.

        Raises:
            ValueError: if the data are empty or differ in length, ``rewind_step`` is not inside
                the training, a weight becomes NaN, or the checkpoint is of another run.
            TypeError: if the data are neither a loader nor a pair.
            MaskMatchError: if a rule matches nothing.
        """
        stages = self._open(model, train, val)
        total = stages.per_epoch * self.train.epochs
        if self.rewind_step >= total:
            raise ValueError(
                f"{self._where}: rewind_step must be less than the {total} steps of a round, "
                f"got {self.rewind_step}"
            )
        masks = MaskSet.dense(model, self.include, self.exclude)
        point = stages.rewind_point(self.rewind_step)
        ladder = self.sparsities()
        results = [self._dense_round(stages, point, len(ladder))]
        for index, sparsity in enumerate(ladder, start=1):
            masks = self._cut(model, masks, sparsity)
            results.append(
                stages.run(
                    f"round {index} of {len(ladder)}",
                    holding(masks),
                    prepare=lambda: point.restore(model),
                    start=point.start,
                )
            )
        self.results_ = results
        self.rewind_weights_ = point.weights
        self._finish(results[-1])
        return results

    def _dense_round(self, stages: Stages, point: RewindPoint, rounds: int) -> PruningResult:
        return stages.run(
            f"round 0 of {rounds}",
            lambda model, total_steps, epoch_steps: None,
            after_step=point.after_step if self.rewind_step else None,
        )

    def _cut(self, model: nn.Module, masks: MaskSet, sparsity: float) -> MaskSet:
        """Switches off the survivors with the lowest scores after training."""
        masks = masks.to(self.train.resolve_device())
        scores = resolve_criterion(self.criterion, self._where).scores(model, masks)
        scope = "global" if self.scope == "global" else self._plan(masks, sparsity)
        return select(scores, masks, sparsity, scope=scope, **self.selection)

    def _plan(self, masks: MaskSet, sparsity: float) -> LayerPlan:
        """Cuts every tensor's survivors by one rate, the last tensor's by its part of it."""
        counts = masks.counts()
        factors = dict.fromkeys(counts, 1.0)
        factors[list(counts)[-1]] = self.output_factor if len(counts) > 1 else 1.0
        elements = sum(total for _, total in counts.values())
        surplus = sum(kept for kept, _ in counts.values()) - (1.0 - sparsity) * elements
        rate = surplus / sum(factors[name] * kept for name, (kept, _) in counts.items())
        return LayerPlan(
            {
                name: 1.0 - kept * max(1.0 - rate * factors[name], 0.0) / total
                for name, (kept, total) in counts.items()
            }
        )

    def _describe(self) -> dict[str, Any]:
        return {
            "sparsity": list(self.sparsity),
            "rate": self.rate,
            "scope": self.scope,
            "output_factor": self.output_factor,
            "rewind_step": self.rewind_step,
            "criterion": describe_rule(self.criterion),
        }


def _ladder(wanted: Sequence[float], rate: float) -> Iterator[float]:
    """Sparsities by rounds: at most ``rate`` of the survivors each, through every wanted one."""
    reached = 0.0
    for target in wanted:
        share = 1.0 - (1.0 - target) / (1.0 - reached)  # of the survivors, until the target
        rounds = Iterative(share, rate=rate)
        for index in range(1, rounds.rounds):
            yield 1.0 - (1.0 - reached) * (1.0 - rounds.sparsity(index))
        yield target
        reached = target
