"""The same masks and the same zeros on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sapwood.pruning import (
    Cubic,
    Linear,
    MaskSet,
    ProgressiveMagnitude,
    Pruner,
    Schedule,
    TrainConfig,
    select,
)

from .toy import LAST, T1, batch, network

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_selection_equals_that_of_the_cpu(scope: str, dtype: torch.dtype) -> None:
    scores = {
        "ties": torch.randint(-3, 4, (300, 70)).to(dtype),
        "normal": torch.randn(64, 33, 3, 3).to(dtype),
        "small": torch.rand(5, 2).to(dtype),
    }
    masks = MaskSet({name: torch.rand(s.shape) > 0.2 for name, s in scores.items()})
    moved = {name: score.to(DEVICE) for name, score in scores.items()}
    for monotone in (True, False):
        here = select(scores, masks, 0.7, scope=scope, monotone=monotone)
        there = select(moved, masks.to(DEVICE), 0.7, scope=scope, monotone=monotone)
        assert all(mask.device.type == DEVICE for mask in there.values())
        assert there.to("cpu") == here


@pytest.mark.parametrize("schedule", [Linear(0.8, t1=T1, every=2), Cubic(0.8, t1=T1, every=2)])
@pytest.mark.parametrize("variant", ["foreach", "fused", "capturable"])
def test_zeros_stay_under_a_scaler(variant: str, schedule: Schedule) -> None:
    model = network().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **{variant: True})
    pruner = Pruner(model, schedule).attach(optimizer)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    for step in range(2 * LAST):
        x, y = (part.to(DEVICE) for part in batch(step))
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 2:
            model[3].bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert pruner.step_count == (step if step >= 2 else step + 1)
        assert pruner.masks.check(model) == []
    assert pruner.finished
    for name, mask in pruner.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        assert all(int(state[key][~mask].count_nonzero()) == 0 for key in ("exp_avg", "exp_avg_sq"))


def test_the_recipe_trains_on_the_device() -> None:
    x, y = batch(0, rows=256)
    config = TrainConfig(epochs=4, batch_size=32, device=DEVICE, amp="bf16", ema=0.9)
    result = ProgressiveMagnitude(0.75, config).fit(network(), (x, y), (x, y))
    assert result.report.sparsity_by_weight == 0.75
    assert result.report.consistent
