"""The training loop that all recipes share, so that a comparison differs in the pruning alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.report import SparsityReport

__all__ = ["Progress", "PruningResult", "TrainConfig", "accuracy"]

#: (X, y) tensors, or anything that yields batches (X, y) and has a length.
Data = tuple[Tensor, Tensor] | DataLoader[Any]
Metric = Callable[[Tensor, Tensor], Tensor]

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Example:
        >>> from sapwood.pruning import TrainConfig
        >>> TrainConfig(epochs=8, lr=0.1).optimizer
        'sgd'

    Args:
        epochs: passes over the data.
        lr: peak learning rate.
        optimizer: ``"sgd"`` (with momentum), ``"adam"`` or ``"adamw"``.
        momentum: of SGD.
        weight_decay: L2 (decoupled for AdamW).
        scheduler: ``"cosine"`` to zero per step, ``"multistep"`` (a tenth after 50 % and 75 % of
            the steps), or ``"none"``.
        batch_size: for tensor pairs; a DataLoader brings its own.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
        ema: decay of an exponential moving average of the weights, which is then what ``val``
            evaluates; None for none.
        grad_clip: largest gradient norm, measured after masking; None for none.
        seed: of data order and dropout.
        device: ``"auto"`` takes CUDA when there is one.

    Raises:
        ValueError: if a value is outside its range.
    """

    epochs: int = 8
    lr: float = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scheduler: Literal["cosine", "multistep", "none"] = "cosine"
    batch_size: int = 128
    amp: Literal["off", "bf16", "fp16"] = "off"
    ema: float | None = None
    grad_clip: float | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        if self.grad_clip is not None:
            positive["grad_clip"] = self.grad_clip
        for name, value in positive.items():
            if not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"sapwood.pruning.TrainConfig: {name} must be finite and positive, got {value}"
                )
        choices = {
            "optimizer": ("sgd", "adam", "adamw"),
            "scheduler": ("cosine", "multistep", "none"),
            "amp": ("off", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"sapwood.pruning.TrainConfig: {name} must be one of {allowed}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(
                f"sapwood.pruning.TrainConfig: ema must be in (0, 1) or None, got {self.ema}"
            )

    def resolve_device(self) -> torch.device:
        """The device to train on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and to do, last batch's loss, sparsity by mask."""

    step: int
    total: int
    loss: float
    sparsity: float


@dataclass(frozen=True)
class PruningResult:
    """What a recipe returns.

    ``masks`` is None for dense training; ``averaged`` is the moving average when there is one.
    ``history`` has one row per epoch: step, epoch, loss, metric, target_sparsity, sparsity, lr.
    """

    model: nn.Module
    masks: MaskSet | None
    history: list[dict[str, float]]
    report: SparsityReport | None
    config: TrainConfig
    wall_s: float
    steps: int
    averaged: nn.Module | None = None


class BuildPruner(Protocol):
    """Makes the pruner once the number of steps is known; None trains densely."""

    def __call__(self, model: nn.Module, total_steps: int, epoch_steps: int) -> Pruner | None: ...


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
    ) -> None:
        self.config = config
        self.loss_fn = loss_fn or F.cross_entropy
        self.metric = metric
        self.progress = progress
        self.device = config.resolve_device()
        self._counted: tuple[MaskSet, float] | None = None

    def fit(self, model: nn.Module, train: Data, val: Data, build: BuildPruner) -> PruningResult:
        """Trains the model in place."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed)
            return self._fit(model.to(self.device), train, val, build)

    def _fit(self, model: nn.Module, train: Data, val: Data, build: BuildPruner) -> PruningResult:
        started = time.perf_counter()
        per_epoch = batches_per_epoch(train, self.config.batch_size)
        total = per_epoch * self.config.epochs
        optimizer = make_optimizer(model, self.config)
        averaged = _average(model, self.config)
        pruner = build(model, total, per_epoch)
        if pruner is not None:
            pruner.attach(optimizer)
            if averaged is not None:
                pruner.track(averaged)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        history: list[dict[str, float]] = []
        step = 0
        for epoch in range(self.config.epochs):
            model.train()
            loss_sum = torch.zeros((), device=self.device)
            for x, y in self._batches(train, shuffle=True):
                set_lr(optimizer, self.config, step, total)
                loss = self._step(model, optimizer, scaler, pruner, x, y)
                if averaged is not None:
                    averaged.update_parameters(model)
                loss_sum += loss
                step += 1
                self._report(step, total, loss, pruner)
            history.append(
                {
                    "step": step,
                    "epoch": epoch + 1,
                    "loss": float(loss_sum) / per_epoch,
                    "metric": self.evaluate(averaged or model, val),
                    "target_sparsity": _target(pruner),
                    "sparsity": self._achieved(pruner),
                    "lr": optimizer.param_groups[0]["lr"],
                }
            )
        report = pruner.report() if pruner else None
        if pruner is not None:
            pruner.detach()
        return PruningResult(
            model=model,
            masks=pruner.masks if pruner else None,
            history=history,
            report=report,
            config=self.config,
            wall_s=time.perf_counter() - started,
            steps=step,
            averaged=averaged,
        )

    def _step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        pruner: Pruner | None,
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss_fn(model(x), y)
        scaler.scale(loss).backward()
        if self.config.grad_clip is not None:
            scaler.unscale_(optimizer)
            if pruner is not None:
                pruner.mask_gradients()  # the norm is that of the gradients which will be used
            nn.utils.clip_grad_norm_(model.parameters(), self.config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def evaluate(self, model: nn.Module, data: Data) -> float:
        """Mean of the metric over the data, in evaluation mode."""
        model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with torch.no_grad(), self._autocast():
            for x, y in self._batches(data, shuffle=False):
                total += self.metric(model(x), y) * len(x)
                count += len(x)
        return float(total) / max(count, 1)

    def _report(self, step: int, total: int, loss: Tensor, pruner: Pruner | None) -> None:
        if self.progress is not None:
            sparsity = self._achieved(pruner)
            self.progress(Progress(step=step, total=total, loss=float(loss), sparsity=sparsity))

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


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that a configuration describes."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    cls = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return cls(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: Optimizer, config: TrainConfig, step: int, total: int) -> None:
    """The learning rate as a pure function of the step, so that nothing has to be resumed."""
    factor = 1.0
    if config.scheduler == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * step / total))
    elif config.scheduler == "multistep":
        factor = 0.1 ** ((step >= 0.5 * total) + (step >= 0.75 * total))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def _average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    if config.ema is None:
        return None
    average = get_ema_multi_avg_fn(config.ema)
    return AveragedModel(model, multi_avg_fn=average)


def _target(pruner: Pruner | None) -> float:
    return pruner.schedule.sparsity(pruner.step_count) if pruner else 0.0
