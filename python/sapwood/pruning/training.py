"""The training loop that all recipes share, so that a comparison differs in the pruning alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sapwood.pruning._session import Session, Start, random_state, set_random_state
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.report import SparsityReport
from sapwood.pruning.train_config import TrainConfig, make_optimizer, set_lr

__all__ = ["Progress", "PruningResult", "accuracy"]

#: (X, y) tensors, or anything that yields batches (X, y) and has a length.
Data = tuple[Tensor, Tensor] | DataLoader[Any]
Metric = Callable[[Tensor, Tensor], Tensor]

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and to do, last batch's loss, sparsity by mask."""

    step: int
    total: int
    loss: float
    sparsity: float
    stage: str = "train"


@dataclass(frozen=True)
class PruningResult:
    """What a recipe returns.

    ``masks`` is None for dense training; ``averaged`` is the moving average when there is one.
    ``history`` has one row per epoch: step, epoch, loss, metric, target_sparsity, sparsity, lr.
    ``steps`` are the optimizer steps of this stage.
    """

    model: nn.Module
    masks: MaskSet | None
    history: list[dict[str, float]]
    report: SparsityReport | None
    config: TrainConfig
    wall_s: float
    steps: int
    averaged: nn.Module | None = None
    stage: str = "train"

    @property
    def metric(self) -> float:
        """The metric after the last epoch."""
        return self.history[-1]["metric"]


class BuildPruner(Protocol):
    """Makes the pruner once the number of steps is known; None trains densely."""

    def __call__(self, model: nn.Module, total_steps: int, epoch_steps: int) -> Pruner | None: ...


class Keeper(Protocol):
    """Where a run keeps its checkpoint."""

    every: int | None  # steps; None: an epoch

    def save(self, session: Session) -> None: ...

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None: ...


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose largest output is the target class.

    Example:
        >>> import torch
        >>> from sapwood.pruning import accuracy
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).item()
        0.5

    Args:
        output: (batch, classes).
        target: (batch,) int64.

    Returns:
        A scalar.
    """
    return (output.argmax(1) == target).float().mean()


class Trainer:
    """One training run; the seed fixes everything random without touching the global state."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        metric: Metric = accuracy,
        progress: Callable[[Progress], None] | None = None,
        stage: str = "train",
        keeper: Keeper | None = None,
        after_step: Callable[[Session], None] | None = None,
        optimizer_fn: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        self.config = config
        self.loss_fn = loss_fn or F.cross_entropy
        self.metric = metric
        self.progress = progress
        self.stage = stage
        self.keeper = keeper
        self.after_step = after_step
        self.optimizer_fn = optimizer_fn  # instead of the optimizer that ``config`` describes
        self.device = config.resolve_device()
        self._counted: tuple[MaskSet, float] | None = None

    def fit(
        self,
        model: nn.Module,
        train: Data,
        val: Data,
        build: BuildPruner,
        start: Start | None = None,
    ) -> PruningResult:
        """Trains the model in place, from ``start`` or from the keeper's checkpoint to the end."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed)
            return self._fit(model.to(self.device), train, val, build, start or Start())

    def _fit(
        self, model: nn.Module, train: Data, val: Data, build: BuildPruner, start: Start
    ) -> PruningResult:
        started = time.perf_counter()
        per_epoch = batches_per_epoch(train, self.config.batch_size)
        total = per_epoch * self.config.epochs
        session = self._open(model, build(model, total - start.step, per_epoch), start)
        earlier = session.wall_s
        while session.step < total:
            model.train()
            for x, y in self._rest_of_epoch(session, train, session.step % per_epoch):
                set_lr(session.optimizer, self.config, session.step, total)
                loss = self._step(session, x, y)
                session.loss_sum += loss
                session.step += 1
                if session.step % per_epoch == 0:
                    self._end_epoch(session, val, per_epoch)
                session.wall_s = earlier + time.perf_counter() - started
                self._after_step(session, total, per_epoch, loss)
        return self._close(session, start)

    def _open(self, model: nn.Module, pruner: Pruner | None, start: Start) -> Session:
        """A session at ``start``, or at the keeper's checkpoint when there is one."""
        session = Session(
            model=model,
            optimizer=self._optimizer(model),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16"),
            pruner=pruner,
            averaged=make_average(model, self.config),
            device=self.device,
            step=start.step,
            loss_sum=torch.zeros((), device=self.device),
        )
        kept = self.keeper.load() if self.keeper is not None else None
        if kept is not None:
            start = session.restore(*kept)
        elif pruner is not None:
            pruner.attach(session.optimizer)
        if pruner is not None and session.averaged is not None:
            pruner.track(session.averaged)
        session.step = start.step
        session.epoch_random = start.epoch_random
        if start.random is not None:
            set_random_state(start.random, self.device)
        return session

    def _optimizer(self, model: nn.Module) -> Optimizer:
        if self.optimizer_fn is not None:
            return self.optimizer_fn(model.parameters())
        return make_optimizer(model, self.config)

    def _close(self, session: Session, start: Start) -> PruningResult:
        pruner = session.pruner
        report = pruner.report() if pruner else None
        if pruner is not None:
            pruner.detach()
        return PruningResult(
            model=session.model,
            masks=pruner.masks if pruner else None,
            history=session.history,
            report=report,
            config=self.config,
            wall_s=session.wall_s,
            steps=session.step - start.step,
            averaged=session.averaged,
            stage=self.stage,
        )

    def _rest_of_epoch(
        self, session: Session, train: Data, done: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the present epoch after the first ``done``.

        They are drawn anew from the random state in which the epoch began, so that a run that goes
        on in the middle of an epoch sees the data it would have seen.
        """
        if done == 0 or session.epoch_random is None:
            session.epoch_random = random_state(self.device)
            yield from self._batches(train, shuffle=True)
            return
        now = random_state(self.device)
        set_random_state(session.epoch_random, self.device)
        batches = self._batches(train, shuffle=True)
        for _ in range(done):
            next(batches)
        set_random_state(now, self.device)
        yield from batches

    def _step(self, session: Session, x: Tensor, y: Tensor) -> Tensor:
        model, optimizer, scaler = session.model, session.optimizer, session.scaler
        optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss_fn(model(x), y)
        scaler.scale(loss).backward()
        if self.config.grad_clip is not None:
            scaler.unscale_(optimizer)
            if session.pruner is not None:
                session.pruner.mask_gradients()  # the norm of the gradients that will be used
            nn.utils.clip_grad_norm_(model.parameters(), self.config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        if session.averaged is not None:
            session.averaged.update_parameters(model)
        return loss.detach()

    def _end_epoch(self, session: Session, val: Data, per_epoch: int) -> None:
        pruner = session.pruner
        session.history.append(
            {
                "step": session.step,
                "epoch": session.step // per_epoch,
                "loss": float(session.loss_sum) / per_epoch,
                "metric": self.evaluate(session.averaged or session.model, val),
                "target_sparsity": pruner.schedule.sparsity(pruner.step_count) if pruner else 0.0,
                "sparsity": self._achieved(pruner),
                "lr": session.optimizer.param_groups[0]["lr"],
            }
        )
        session.loss_sum.zero_()

    def _after_step(self, session: Session, total: int, per_epoch: int, loss: Tensor) -> None:
        """Everything is consistent here: the place to show, to keep and to be interrupted."""
        if self.after_step is not None:
            self.after_step(session)
        try:
            if self.progress is not None:
                sparsity = self._achieved(session.pruner)
                self.progress(Progress(session.step, total, float(loss), sparsity, self.stage))
        except BaseException:
            if self.keeper is not None:
                self.keeper.save(session)
            raise
        if self.keeper is not None and session.step % (self.keeper.every or per_epoch) == 0:
            self.keeper.save(session)

    def evaluate(self, model: nn.Module, data: Data) -> float:
        """Mean of the metric over the data, in evaluation mode."""
        model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with torch.no_grad(), self._autocast():
            for x, y in self._batches(data, shuffle=False):
                total += self.metric(model(x), y) * len(x)
                count += len(x)
        return float(total) / max(count, 1)

    def _achieved(self, pruner: Pruner | None) -> float:
        """Sparsity by mask; counted only when the masks have changed."""
        if pruner is None:
            return 0.0
        if self._counted is None or self._counted[0] is not pruner.masks:
            self._counted = (pruner.masks, pruner.masks.sparsity())
        return self._counted[1]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AMP[self.config.amp])

    def _batches(self, data: Data, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
        if not isinstance(data, tuple):
            for x, y in data:
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            return
        x_all, y_all = data
        order = torch.randperm(len(x_all)) if shuffle else torch.arange(len(x_all))
        for index in torch.split(order, self.config.batch_size):
            picked = index.to(x_all.device)
            yield x_all[picked].to(self.device), y_all[picked].to(self.device)


def batches_per_epoch(data: Data, batch_size: int) -> int:
    """Optimizer steps in one pass; the last batch may be short.

    Raises:
        ValueError: if there is no data, or X and y differ in length.
        TypeError: if it is neither a tensor pair nor a loader.
    """
    where = "sapwood.pruning.fit"
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
            raise TypeError(f"{where}: train must be a loader or a pair (X, y) of tensors")
        if len(data[0]) != len(data[1]):
            raise ValueError(
                f"{where}: y must have as many rows as X, {len(data[0])}, got {len(data[1])}"
            )
        count = math.ceil(len(data[0]) / batch_size)
    elif isinstance(data, Iterable) and hasattr(data, "__len__"):
        count = len(data)
    else:
        raise TypeError(
            f"{where}: train must be a loader or a pair (X, y) of tensors, "
            f"got {type(data).__name__}"
        )
    if count == 0:
        raise ValueError(f"{where}: train must hold at least one batch, got none")
    return count


def make_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The moving average that a configuration asks for."""
    if config.ema is None:
        return None
    average = get_ema_multi_avg_fn(config.ema)
    return AveragedModel(model, multi_avg_fn=average)
