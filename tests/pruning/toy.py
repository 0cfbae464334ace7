"""A small network, its training step, and the optimizers that the tests go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sapwood.pruning import Pruner

T1, LAST = 6, 12
Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True
    ),
    "sgd-loop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, foreach=False),
    "rmsprop-foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, foreach=True),
}


class Restless(torch.optim.SGD):
    """Moves every weight, whatever its gradient, before (and after) the step of its base class."""

    late = True

    def step(self, closure: Any = None) -> Any:
        self._move()
        loss = super().step(closure)
        if self.late:
            self._move()
        return loss

    def _move(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 0.5


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batch(step: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def train_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def assert_masked(pruner: Pruner, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Masked weights are +0.0 bit for bit, and the optimizer's state is zero there."""
    parameters = dict(model.named_parameters())
    for name, mask in pruner.masks.items():
        weight = parameters[name].detach()
        assert int(weight[~mask].view(torch.int32).count_nonzero()) == 0, name
        states = optimizer.state[parameters[name]] if optimizer is not None else {}
        for key, value in states.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert int(value[~mask].count_nonzero()) == 0, f"{name} {key}"
