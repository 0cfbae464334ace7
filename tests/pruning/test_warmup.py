"""The learning rate that rises at the beginning, and an optimizer of one's own in the loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sapwood.pruning import TrainConfig
from sapwood.pruning.train_config import set_lr
from sapwood.pruning.training import Trainer


def rates(config: TrainConfig, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    found = []
    for step in range(total):
        set_lr(optimizer, config, step, total)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_it_rises_on_a_line_and_joins_the_schedule() -> None:
    plain = rates(TrainConfig(lr=0.4, scheduler="none"), 40)
    warm = rates(TrainConfig(lr=0.4, scheduler="none", warmup=0.1), 40)
    assert plain == [0.4] * 40
    assert warm[:4] == pytest.approx([0.08, 0.16, 0.24, 0.32])
    assert warm[4:] == plain[4:]
    cosine = rates(TrainConfig(lr=0.4), 40)
    assert rates(TrainConfig(lr=0.4, warmup=0.1), 40)[4:] == cosine[4:]
    assert rates(TrainConfig(lr=0.4, warmup=0.0), 40) == cosine


@pytest.mark.parametrize("warmup", [-0.1, 1.0, float("nan")])
def test_it_is_a_share(warmup: float) -> None:
    with pytest.raises(ValueError, match=r"TrainConfig: warmup must be in \[0, 1\), got"):
        TrainConfig(warmup=warmup)


def test_the_loop_takes_an_optimizer_of_ones_own() -> None:
    made: list[torch.optim.Optimizer] = []

    def make(parameters: object) -> torch.optim.Optimizer:
        made.append(torch.optim.RMSprop(parameters, lr=9.0))  # type: ignore[arg-type]
        return made[-1]

    x = torch.randn(32, 4)
    data = (x, (x[:, 0] > 0).long())
    config = TrainConfig(epochs=1, lr=0.01, scheduler="none", batch_size=8, device="cpu")
    Trainer(config, optimizer_fn=make).fit(nn.Linear(4, 2), data, data, lambda *_: None)
    assert len(made) == 1
    assert made[0].param_groups[0]["lr"] == 0.01  # the configuration's rate holds
