"""How a recipe trains: its configuration, the optimizer and the learning rate that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["TrainConfig"]

_WHERE = "sapwood.pruning.TrainConfig"


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
        warmup: share of the steps, in [0, 1), in which the learning rate rises from 0 to what the
            scheduler says.
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
    warmup: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        if self.grad_clip is not None:
            positive["grad_clip"] = self.grad_clip
        for name, value in positive.items():
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{_WHERE}: {name} must be finite and positive, got {value}")
        choices = {
            "optimizer": ("sgd", "adam", "adamw"),
            "scheduler": ("cosine", "multistep", "none"),
            "amp": ("off", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{_WHERE}: {name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"{_WHERE}: ema must be in (0, 1) or None, got {self.ema}")

        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"{_WHERE}: warmup must be in [0, 1), got {self.warmup}")

    def resolve_device(self) -> torch.device:
        """The device to train on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


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
    rising = config.warmup * total
    if step < rising:
        factor *= (step + 1) / (math.floor(rising) + 1)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
