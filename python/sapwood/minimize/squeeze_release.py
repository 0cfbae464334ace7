"""The cycle: prune (squeeze), minimize, release, train, and prune again."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sapwood import _check
from sapwood.minimize._cycle import Cycle, SqueezeReleaseResult, Store, Subject
from sapwood.minimize._squeeze import Unused, finish, score_criterion
from sapwood.minimize.release import release
from sapwood.minimize.report import MinimizeReport
from sapwood.pruning._names import Rule
from sapwood.pruning.allocation import require_sparsity
from sapwood.pruning.criteria import Criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.schedules import Constant, Cubic
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data, Metric, Progress, Trainer, accuracy, batches_per_epoch

__all__ = ["SqueezeRelease"]

_WHERE = "minimize.SqueezeRelease"
_UPDATES = 20  # of the masks, per cycle
_CALIBRATION_ROWS = 512
_RELEASE_LR = 0.3
_RELEASE_WARMUP = 0.05
_SCORES = ("group", "activation", "magnitude")


class SqueezeRelease:
    """Shrinks a network far beyond one pass of pruning, in cycles that each end minimized.

    Every cycle prunes gradually to ``nnz_factor`` times the weights of the one before, fine-tunes
    with fixed masks and minimizes: what is left is a smaller dense network with the same outputs.
    Before the next one, the zeros inside it are released as small noise and train again.

    Example:
        >>> import torch
        >>> from sapwood.minimize import SqueezeRelease
        >>> from sapwood.pruning import TrainConfig
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 20)
        >>> data = (x, (x[:, 0] * x[:, 1] > 0).long())
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
        ... )
        >>> train = TrainConfig(epochs=4, lr=0.05, batch_size=32)
        >>> driver = SqueezeRelease(cycles=2, first_sparsity=0.8, train=train)
        >>> result = driver.fit(model, data, data)
        >>> result.cycles[-1].parameters < result.dense.parameters / 2
        True

    Args:
        cycles: how many, at least 1; the last step of each is a minimization.
        first_sparsity: share of the prunable weights that the first cycle removes, in (0, 1).
        nnz_factor: what every further cycle leaves of the weights before it, in (0, 1). The counts
            refer to the original network, not to what has become of it.
        score: ``"group"``, ``"activation"``, ``"magnitude"``, or a criterion.
        train: how to train. ``epochs`` is the length of the dense training; the other phases use
            the same optimizer, batch size and learning rate: constant while pruning, by the
            scheduler while fine-tuning, 0.3 times with a warm-up after a release.
        phase_epochs: epochs of pruning, fine-tuning and training after a release; default: a
            quarter of ``train.epochs``, at least 1.
        release: False keeps the zeros masked in the training between cycles, as the control.
        tau: see :func:`release`.
        delta: see :func:`release`.
        finish: zeroes rows and columns of at most this many weights, after pruning, where that
            raises the loss on a calibration batch by less than 0.1 %; 0 does not try.
        max_drop: stops after the first cycle whose metric is further below the dense one, and
            makes ``best`` the smallest network within it. None runs all cycles; ``best`` is then
            the smallest.
        include: which parameters are pruned; see ``MaskSet.dense``.
        exclude: which not.
        metric: (output, y) -> scalar mean over the batch, higher is better.
        progress: called after every optimizer step; the stage says which phase it is.
        callback: called with every :class:`Cycle` and its network when it ends.
        checkpoint: a folder for the networks of the finished cycles and where the run stands.
        resume: go on after the last finished cycle in that folder.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Our implementation of Squeeze-Release, arXiv:2606.14346, of which the abstract was read:
        schedule, score, calibration and the rules of minimization are ours.
    """

    def __init__(
        self,
        *,
        cycles: int = 4,
        first_sparsity: float = 0.90,
        nnz_factor: float = 0.5,
        score: str | Criterion = "group",
        train: TrainConfig | None = None,
        phase_epochs: tuple[int, int, int] | None = None,
        release: bool = True,
        tau: float = 0.02,
        delta: float = 0.01,
        finish: int = 2,
        max_drop: float | None = None,
        include: Sequence[Rule] | None = None,
        exclude: Sequence[Rule] | None = None,
        metric: Metric = accuracy,
        progress: Callable[[Progress], None] | None = None,
        callback: Callable[[Cycle, nn.Module], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
            _check.fail(ValueError, _WHERE, "cycles", "be at least 1", cycles)
        require_sparsity(first_sparsity, f"sapwood.{_WHERE}", "first_sparsity")
        for name, value in (("first_sparsity", first_sparsity), ("nnz_factor", nnz_factor)):
            if not 0.0 < value < 1.0:
                _check.fail(ValueError, _WHERE, name, "lie in (0, 1)", value)
        if isinstance(score, str):
            _check.one_of(_WHERE, "score", score, _SCORES)
        if finish < 0:
            _check.fail(ValueError, _WHERE, "finish", "be at least 0", finish)
        if max_drop is not None and not max_drop >= 0:
            _check.fail(ValueError, _WHERE, "max_drop", "be at least 0 or None", max_drop)
        if resume and checkpoint is None:
            _check.fail(ValueError, _WHERE, "checkpoint", "be a folder with resume=True", None)
        self.cycles, self.first_sparsity, self.nnz_factor = cycles, first_sparsity, nnz_factor
        self.score, self.finish, self.max_drop = score, finish, max_drop
        self.train = train or TrainConfig()
        quarter = max(1, self.train.epochs // 4)
        self.phase_epochs = phase_epochs or (quarter, quarter, quarter)
        if len(self.phase_epochs) != 3 or min(self.phase_epochs) < 1:
            _check.fail(
                ValueError, _WHERE, "phase_epochs", "be three positive counts", phase_epochs
            )
        self.release, self.tau, self.delta = release, tau, delta
        self.include, self.exclude = include, exclude
        self.metric, self.progress, self.callback = metric, progress, callback
        self.checkpoint, self.resume = checkpoint, resume

    def fit(
        self,
        model: nn.Module,
        train: Any,
        val: Any,
        optimizer_fn: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        trained: bool = False,
    ) -> SqueezeReleaseResult:
        """Trains the model densely, then runs the cycles.

        Args:
            model: the model, trained in place by the dense phase and left so by the cycles.
            train: a DataLoader of (X, y), or a pair of tensors X: (rows, ...), y: (rows, ...).
            val: the same, for the metric.
            optimizer_fn: parameters -> optimizer, instead of the one that ``train`` of the
                constructor describes; its learning rate is then the base.
            loss_fn: (output, y) -> scalar; default: cross entropy.
            trained: the model is trained already: no dense phase.

        Returns:
            The networks of all cycles, their Pareto front and the best of them.

        Raises:
            ValueError: if the data are empty or differ in length, or the checkpoint is of another
                run.
            MinimizeError: if a minimized network does not compute what the masked one does.
        """
        config = self.train
        if optimizer_fn is not None:
            lr = optimizer_fn(copy.deepcopy(model).parameters()).param_groups[0]["lr"]
            config = replace(config, lr=lr)
        run = _Run(self, config, train, val, optimizer_fn, loss_fn)
        return run.fit(model, trained)


class _Run:
    """One call of ``fit``."""

    def __init__(
        self,
        settings: SqueezeRelease,
        config: TrainConfig,
        train: Data,
        val: Data,
        optimizer_fn: Callable[[Iterable[nn.Parameter]], Optimizer] | None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.settings, self.config = settings, config
        self.data, self.val = train, val
        self.optimizer_fn, self.loss_fn = optimizer_fn, loss_fn or F.cross_entropy
        self.epoch_steps = batches_per_epoch(train, config.batch_size)
        self.calibration = _first_rows(train, _CALIBRATION_ROWS)
        self._phases = 0

    def fit(self, model: nn.Module, trained: bool) -> SqueezeReleaseResult:
        settings = self.settings
        store = Store(settings.checkpoint, self._describe(trained), settings.resume)
        original = copy.deepcopy(model)
        subject = store.load(model, lambda: copy.deepcopy(original))
        model.to(self.config.resolve_device())
        if subject is None:
            if not trained:
                self._train(model, "dense", self.config.epochs)
            masks = MaskSet.dense(model, settings.include, settings.exclude)
            rules = settings.include is not None or settings.exclude is not None
            subject = Subject.dense(model, self._metric(model), masks, self._example, rules=rules)
            store.save(subject, model, None)
        networks: list[nn.Module] = list(subject.networks)
        small = networks[-1] if networks else copy.deepcopy(subject.model)
        self._phases = max(1, 3 * len(networks))  # a resumed run draws what the whole one draws
        for number in range(len(networks) + 1, settings.cycles + 1):
            if subject.exceeds(settings.max_drop):
                break
            small, report, cycle = self._cycle(number, small, subject)
            networks.append(small)
            subject.cycles.append(cycle)
            store.save(subject, small, report)
            if settings.callback is not None:
                settings.callback(cycle, small)
        return SqueezeReleaseResult.of(subject, networks, settings.max_drop)

    def _cycle(
        self, number: int, model: nn.Module, subject: Subject
    ) -> tuple[nn.Module, MinimizeReport, Cycle]:
        """Release and train (from the second cycle on), prune, fine-tune, minimize."""
        settings = self.settings
        prune_epochs, finetune_epochs, release_epochs = settings.phase_epochs
        model = copy.deepcopy(model).to(self.config.resolve_device())
        rise, masks = None, None
        if number > 1:
            if settings.release:
                seed = self.config.seed + number
                report = release(
                    model,
                    self.calibration,
                    self.loss_fn,
                    tau=settings.tau,
                    delta=settings.delta,
                    seed=seed,
                )
                rise = report.rise
            else:
                masks = subject.masks(model, zeros=True)
            self._train(
                model,
                f"cycle {number} {'release' if settings.release else 'train'}",
                release_epochs,
                masks=masks,
                lr=_RELEASE_LR * self.config.lr,
                warmup=_RELEASE_WARMUP,
            )
        wanted = (1 - settings.first_sparsity) * settings.nnz_factor ** (number - 1)
        masks = self._prune(model, f"cycle {number} prune", prune_epochs, masks, wanted, subject)
        self._train(model, f"cycle {number} finetune", finetune_epochs, masks=masks)
        small, minimized = subject.minimize(model, masks, self._example)
        return small, minimized, Cycle.of(number, small, minimized, self._metric(small), rise)

    def _prune(
        self,
        model: nn.Module,
        stage: str,
        epochs: int,
        masks: MaskSet | None,
        wanted: float,
        subject: Subject,
    ) -> MaskSet:
        """Gradually down to the wanted share of the original's weights, then the finish step."""
        start = masks or subject.masks(model)
        total = sum(n for _, n in start.counts().values())
        sparsity = max(0.0, 1.0 - wanted * subject.prunable / total)
        if sparsity == 0.0:
            return start
        steps = epochs * self.epoch_steps
        every = max(1, steps // _UPDATES)
        criterion = score_criterion(self.settings.score, self.calibration[0])
        pruner = Pruner(
            model,
            Cubic(sparsity, t1=steps, every=every),
            criterion,
            masks=start,
            monotone=masks is not None,
        )
        self._fit(model, stage, epochs, replace(self._phase(), scheduler="none"), pruner)
        found = pruner.masks
        if self.settings.finish:
            found = finish(model, found, self.calibration, self.loss_fn, self.settings.finish)
        return found

    def _train(
        self,
        model: nn.Module,
        stage: str,
        epochs: int,
        *,
        masks: MaskSet | None = None,
        lr: float | None = None,
        warmup: float = 0.0,
    ) -> None:
        """Trains with fixed masks, or without."""
        config = replace(self._phase(), lr=lr or self.config.lr, warmup=warmup)
        pruner = None
        if masks is not None:
            pruner = Pruner(model, Constant(masks.sparsity()), masks=masks)
        self._fit(model, stage, epochs, config, pruner)

    def _fit(
        self, model: nn.Module, stage: str, epochs: int, config: TrainConfig, pruner: Pruner | None
    ) -> None:
        trainer = Trainer(
            replace(config, epochs=epochs),
            loss_fn=self.loss_fn,
            metric=self.settings.metric,
            progress=self.settings.progress,
            stage=stage,
            after_step=None if pruner is None else Unused(model, pruner),
            optimizer_fn=self.optimizer_fn,
        )
        trainer.fit(model, self.data, self.val, lambda *_: pruner)

    def _phase(self) -> TrainConfig:
        """The configuration with a seed of its own, so that phases see data in other orders."""
        self._phases += 1
        return replace(self.config, seed=self.config.seed + 1000 * self._phases)

    def _metric(self, model: nn.Module) -> float:
        return Trainer(self.config, metric=self.settings.metric).evaluate(model, self.val)

    @property
    def _example(self) -> Tensor:
        return self.calibration[0][:8]

    def _describe(self, trained: bool) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        settings = self.settings
        score = settings.score if isinstance(settings.score, str) else repr(settings.score)
        return {
            "first_sparsity": settings.first_sparsity,
            "nnz_factor": settings.nnz_factor,
            "score": score,
            "train": vars(self.config),
            "phase_epochs": list(settings.phase_epochs),
            "release": settings.release,
            "tau": settings.tau,
            "delta": settings.delta,
            "finish": settings.finish,
            "trained": trained,
        }


def _first_rows(data: Data, rows: int) -> tuple[Tensor, Tensor]:
    """The first rows of the training data, in their own order."""
    if isinstance(data, tuple):
        return data[0][:rows], data[1][:rows]
    found: list[tuple[Tensor, Tensor]] = []
    for x, y in data:
        found.append((x, y))
        if sum(len(part) for part, _ in found) >= rows:
            break
    x, y = (torch.cat(parts)[:rows] for parts in zip(*found, strict=True))
    return x, y
