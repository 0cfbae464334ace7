"""What all recipes share: their options, and the files of an interrupted run."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from sapwood.pruning._names import Rule
from sapwood.pruning._stages import Stages
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data, Metric, Progress, PruningResult
from sapwood.pruning.training import accuracy as default_metric

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Recipe", "RecipeOptions", "TrainingRecipe"]


class RecipeOptions(TypedDict, total=False):
    """The keyword arguments that every recipe takes; ``Recipe`` describes them."""

    include: Sequence[Rule] | None
    exclude: Sequence[Rule] | None
    granularity: str
    n_m: tuple[int, int] | None
    on_misfit: str
    min_keep_per_layer: int
    min_keep_per_unit: int
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None
    metric: Metric
    progress: Callable[[Progress], None] | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int | None
    resume: bool


class Recipe:
    """The base of all recipes: one or more training runs, the stages, that end in a pruned model.

    With ``checkpoint``, every finished stage is written to a file of that folder and the running
    one every ``checkpoint_every`` steps; ``resume=True`` then goes on where the folder ends, and on
    the CPU the final weights are the same bits as without the interruption. A ``progress`` callback
    may stop a run by raising, for instance ``KeyboardInterrupt``: the checkpoint is written first.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from sapwood.pruning import ProgressiveMagnitude, TrainConfig
        >>> x = torch.randn(64, 8)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recipe = ProgressiveMagnitude(
        ...         0.5, TrainConfig(epochs=2, batch_size=16), checkpoint=folder, resume=True
        ...     )
        ...     result = recipe.fit(torch.nn.Linear(8, 2), data, data)
        >>> result.steps
        8

    Args:
        train: how to train; default ``TrainConfig()``.
        options: keyword arguments, all optional:
            ``include``, ``exclude``: which parameters; see ``MaskSet.dense``.
            ``granularity``, ``n_m``, ``on_misfit``: what goes as one; see ``select``.
            ``min_keep_per_layer``: elements that every tensor keeps; default 1.
            ``min_keep_per_unit``: elements that every output row keeps; default 0.
            ``loss_fn``: (output, y) -> scalar; default: cross entropy.
            ``metric``: (output, y) -> scalar mean over the batch; default: accuracy.
            ``progress``: called after every step.
            ``checkpoint``: a folder; created when missing, refused when it holds another run.
            ``checkpoint_every``: steps between checkpoints; default: one epoch.
            ``resume``: go on from the folder; from the beginning when it is empty.

    Raises:
        TypeError: if there is an unknown option.
        ValueError: if ``checkpoint_every`` is no positive integer, or ``resume`` lacks a folder.
    """

    def __init__(self, train: TrainConfig | None, **options: Unpack[RecipeOptions]) -> None:
        where = self._where
        unknown = sorted(set(options) - set(RecipeOptions.__annotations__))
        if unknown:
            raise TypeError(
                f"{where}: options must be among {sorted(RecipeOptions.__annotations__)}, "
                f"got {unknown[0]!r}"
            )
        self.train = train or TrainConfig()
        self.include = options.get("include")
        self.exclude = options.get("exclude")
        #: Keyword arguments for ``select``.
        self.selection: dict[str, Any] = {
            "granularity": options.get("granularity", "element"),
            "n_m": options.get("n_m"),
            "on_misfit": options.get("on_misfit", "raise"),
            "min_keep_per_layer": options.get("min_keep_per_layer", 1),
            "min_keep_per_unit": options.get("min_keep_per_unit", 0),
        }
        self.loss_fn = options.get("loss_fn")
        self.metric = options.get("metric", default_metric)
        self.progress = options.get("progress")
        self.checkpoint = options.get("checkpoint")
        self.checkpoint_every = options.get("checkpoint_every")
        self.resume = options.get("resume", False)
        every = self.checkpoint_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise TypeError(f"{where}: checkpoint_every must be an integer, got {every!r}")
        if every is not None and every < 1:
            raise ValueError(f"{where}: checkpoint_every must be at least 1, got {every}")
        if self.resume and self.checkpoint is None:
            raise ValueError(f"{where}: checkpoint must be a folder with resume=True, got None")

    @property
    def _where(self) -> str:
        return f"sapwood.pruning.{type(self).__name__}"

    def _describe(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values; an interrupted run goes on only when equal."""
        return {}

    def _open(self, model: nn.Module, train: Data, val: Data) -> Stages:
        return Stages(self, self._where, self._describe(), model, train, val)

    def _finish(self, result: PruningResult) -> PruningResult:
        """Keeps the fitted attributes."""
        self.result_ = result
        self.model_ = result.model
        self.masks_ = result.masks
        return result


class TrainingRecipe(Recipe, ABC):
    """A recipe of one training run: all that differs is the pruner."""

    def fit(self, model: nn.Module, train: Any, val: Any) -> PruningResult:
        """Trains and prunes the model in place, on the configured device.

        Args:
            model: the model, freshly initialised or pretrained.
            train: a DataLoader of (X, y), or a pair of tensors X: (rows, ...), y: (rows, ...).
            val: the same, for the metric after each epoch.

        Returns:
            Model, masks, history and report; also kept as ``model_``, ``masks_`` and ``result_``.

        Raises:
            ValueError: if the data are empty or differ in length, a class has too few rows for
                GraSP, a weight becomes NaN, or the checkpoint is of another run.
            TypeError: if the data are neither a loader nor a pair.
            MaskMatchError: if a rule matches nothing.
        """

        def build(model: nn.Module, total_steps: int, epoch_steps: int) -> Pruner | None:
            return self._pruner(model, train, total_steps, epoch_steps)

        return self._finish(self._open(model, train, val).run("train", build))

    @abstractmethod
    def _pruner(
        self, model: nn.Module, train: Data, total_steps: int, epoch_steps: int
    ) -> Pruner | None:
        """Makes the pruner once the number of steps is known; None trains densely."""
