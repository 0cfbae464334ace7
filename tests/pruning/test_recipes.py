"""Recipes: determinism, options, and the effect on scikit-learn's digits."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sapwood.pruning import (
    Cubic,
    OneShot,
    Progress,
    ProgressiveMagnitude,
    PruningResult,
    TrainConfig,
)
from sapwood.pruning.train_config import make_optimizer, set_lr

Pair = tuple[Tensor, Tensor]


def blobs(rows: int = 96, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


SHORT = TrainConfig(epochs=3, batch_size=16, device="cpu")


def fit(sparsity: float | None = 0.8, config: TrainConfig = SHORT, **options: Any) -> PruningResult:
    return ProgressiveMagnitude(sparsity, config, **options).fit(network(), blobs(), blobs(seed=1))


def test_result() -> None:
    recipe = ProgressiveMagnitude(0.8, SHORT)
    model = network()
    result = recipe.fit(model, blobs(), blobs(seed=1))
    assert result.model is recipe.model_ is model
    assert result.masks is recipe.masks_
    assert result.masks.sparsity() == pytest.approx(0.8, abs=0.5 / 160)
    assert result.report.consistent
    assert result.steps == 18
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    keys = {"step", "epoch", "loss", "metric", "target_sparsity", "sparsity", "lr"}
    assert all(set(row) == keys for row in result.history)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_dense_training_shares_the_code() -> None:
    result = fit(None)
    assert (result.masks, result.report) == (None, None)
    assert [row["sparsity"] for row in result.history] == [0.0, 0.0, 0.0]
    zero = fit(0.0)
    for a, b in zip(result.model.parameters(), zero.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_seed_decides_everything_and_the_global_state_is_untouched() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    model = network()
    torch.random.set_rng_state(before)
    results = []
    for seed in (0, 0, 1):
        config = TrainConfig(epochs=2, batch_size=16, seed=seed, device="cpu")
        twin = copy.deepcopy(model)
        ProgressiveMagnitude(0.8, config).fit(twin, blobs(), blobs())
        results.append([p.detach().clone() for p in twin.parameters()])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_loaders_work_like_pairs() -> None:
    loaders = []
    for seed, shuffle in ((0, True), (1, False)):
        loaders.append(DataLoader(TensorDataset(*blobs(seed=seed)), batch_size=16, shuffle=shuffle))
    first, second = (
        ProgressiveMagnitude(0.8, SHORT).fit(network(), loaders[0], loaders[1]) for _ in range(2)
    )
    assert first.steps == 18
    assert first.masks == second.masks
    assert first.history == second.history


def test_a_second_fit_goes_on_from_the_first() -> None:
    recipe = ProgressiveMagnitude(0.5, SHORT)
    model = network()
    recipe.fit(model, blobs(), blobs())
    result = recipe.fit(model, blobs(), blobs())
    assert result.report.sparsity_by_weight == 0.5
    assert result.report.consistent


def test_progress_is_called_after_every_step() -> None:
    seen: list[Progress] = []
    result = fit(progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 19))
    assert {p.total for p in seen} == {18}
    assert all(math.isfinite(p.loss) for p in seen)
    assert seen[0].sparsity == 0.0
    assert seen[-1].sparsity == result.masks.sparsity()
    changes = {b.step for a, b in itertools.pairwise(seen) if a.sparsity != b.sparsity}
    assert changes == {6, 12, 14}


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "ema": 0.9},
        {"amp": "bf16"},
        {"amp": "fp16", "grad_clip": 1.0},
        {"grad_clip": 0.5, "scheduler": "multistep"},
        {"scheduler": "none", "ema": 0.5, "lr": 0.02},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_options_end_exact_and_consistent(options: dict[str, Any]) -> None:
    config = TrainConfig(**{"epochs": 4, "batch_size": 16, "device": "cpu", **options})
    result = fit(0.75, config)
    assert result.masks.sparsity() == 0.75
    assert result.report.consistent
    assert result.history[-1]["metric"] > 0.6
    assert (result.averaged is not None) == ("ema" in options)
    if result.averaged is not None:
        assert result.masks.check(result.averaged) == []


@pytest.mark.parametrize("scope", ["layer", "erk"])
@pytest.mark.parametrize("schedule", ["cubic", OneShot(0.6, at=5), Cubic(0.6, t1=0.5, every=2)])
def test_schedules_and_scopes(schedule: Any, scope: str) -> None:
    result = fit(0.6, schedule=schedule, scope=scope)
    assert result.report.sparsity_by_weight == pytest.approx(0.6)
    assert result.report.consistent


def test_learning_rates() -> None:
    optimizer = make_optimizer(network(), TrainConfig(lr=0.4))
    expected = {
        "cosine": lambda s: 0.2 * (1 + math.cos(math.pi * s / 8)),
        "multistep": lambda s: 0.4 * (0.01 if s >= 6 else 0.1 if s >= 4 else 1),
        "none": lambda s: 0.4,
    }
    for scheduler, rate in expected.items():
        for step in range(8):
            set_lr(optimizer, TrainConfig(lr=0.4, scheduler=scheduler), step, 8)  # type: ignore[arg-type]
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs must be finite and positive, got 0"),
        ({"lr": math.nan}, "lr must be finite and positive, got nan"),
        ({"grad_clip": 0.0}, "grad_clip must be finite and positive, got 0.0"),
        ({"optimizer": "lion"}, "optimizer must be one of .* got 'lion'"),
        ({"scheduler": "step"}, "scheduler must be one of .* got 'step'"),
        ({"amp": "fp8"}, "amp must be one of .* got 'fp8'"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\) or None, got 1\.0"),
    ],
)
def test_config_validates(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {text}"):
        TrainConfig(**options)


@pytest.mark.parametrize("sparsity", [math.nan, math.inf, 1.0, -0.1])
def test_sparsity_must_be_finite_and_below_one(sparsity: float) -> None:
    with pytest.raises(ValueError, match="ProgressiveMagnitude: sparsity must be finite and in"):
        ProgressiveMagnitude(sparsity)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ((torch.ones(4, 8), torch.ones(3).long()), ValueError, "y must have as many rows as X, 4"),
        ((torch.ones(0, 8), torch.ones(0).long()), ValueError, "must hold at least one batch"),
        ((torch.ones(4, 8),), TypeError, "must be a loader or a pair"),
        (3, TypeError, "must be a loader or a pair .*, got int"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ProgressiveMagnitude(0.5, SHORT).fit(network(), data, blobs())


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of \['cubic', 'linear'\]"):
        ProgressiveMagnitude(0.5, schedule="quadratic")


def test_digits_keep_their_accuracy_at_ninety_percent() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.from_numpy(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x / 16).float()[order], y[order]
    train, test = (x[:1350], y[:1350]), (x[1350:], y[1350:])
    accuracy: dict[float | None, float] = {}
    for sparsity in (None, 0.9):
        runs = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
            config = TrainConfig(epochs=20, batch_size=64, seed=seed, device="cpu")
            result = ProgressiveMagnitude(sparsity, config).fit(model, train, test)
            runs.append(100 * result.history[-1]["metric"])
        accuracy[sparsity] = sum(runs) / len(runs)
    assert accuracy[None] > 95
    assert accuracy[0.9] >= accuracy[None] - 1.5, accuracy
