"""The cycle: sizes and accuracy on digits, equality of masked and minimized, resuming, controls."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sapwood.data import load_digits
from sapwood.minimize import CompensatedLayerNorm, Cycle, SqueezeRelease, SqueezeReleaseResult
from sapwood.models import ConvNeXt, mlp
from sapwood.pruning import Magnitude, MaskSet, Progress, TrainConfig

Pair = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(rows: int = 400) -> Pair:
    """Four classes, of which 6 of 24 features tell."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % 4
    x = torch.randn(rows, 24, generator=generator)
    x[:, :6] += 2.0 * torch.randn(4, 6, generator=generator)[y]
    return x, y


def perceptron(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
        )


TRAIN = TrainConfig(epochs=4, lr=0.05, batch_size=50, seed=1)


def driver(**kwargs: Any) -> SqueezeRelease:
    options = {"cycles": 2, "first_sparsity": 0.8, "train": TRAIN}
    return SqueezeRelease(**(options | kwargs))


def fit(**kwargs: Any) -> SqueezeReleaseResult:
    data = blobs()
    return driver(**kwargs).fit(perceptron(), data, data)


@pytest.fixture(scope="module")
def result() -> SqueezeReleaseResult:
    return fit()


def accuracy(model: nn.Module, data: Pair) -> float:
    model.eval()
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


def test_figures_are_those_of_the_networks(result: SqueezeReleaseResult) -> None:
    data = blobs()
    assert [cycle.number for cycle in result.cycles] == [1, 2]
    for cycle, network in zip(result.cycles, result.networks, strict=True):
        numbers = sum(p.numel() for p in network.parameters())
        indices = sum(b.numel() for b in network.buffers())
        assert cycle.parameters == numbers + indices
        assert cycle.metric == pytest.approx(accuracy(network, data), abs=1e-6)
        weights = [p for p in network.parameters() if p.dim() > 1]
        assert cycle.nonzeros == sum(int(w.count_nonzero()) for w in weights)
        assert cycle.max_error is not None
        assert cycle.max_error <= 1e-9
    assert result.dense.parameters == sum(p.numel() for p in perceptron().parameters())
    assert result.dense.metric > 0.9


def test_every_cycle_keeps_the_wanted_share_of_the_original(result: SqueezeReleaseResult) -> None:
    prunable = 24 * 64 + 64 * 32 + 32 * 4
    for cycle, share in zip(result.cycles, (0.2, 0.1), strict=True):
        assert 0.5 * share * prunable < cycle.nonzeros <= share * prunable + 1
    sizes = [result.dense.parameters, *(cycle.parameters for cycle in result.cycles)]
    assert sizes == sorted(sizes, reverse=True)
    assert result.cycles[0].release_rise is None
    assert result.cycles[1].release_rise is not None
    assert result.cycles[1].release_rise <= 0.01 + 1e-6


def test_best_and_pareto() -> None:
    def point(number: int, parameters: int, metric: float) -> Cycle:
        return Cycle(number, parameters, 0, 0, 0, 0.0, metric)

    class Run:
        point = None
        model = nn.Identity()
        cycles: list[Cycle]

    run: Any = Run()
    run.point = point(0, 100, 0.90)
    run.cycles = [point(1, 50, 0.92), point(2, 60, 0.91), point(3, 20, 0.85), point(4, 10, 0.60)]
    networks = [nn.Linear(1, 1) for _ in range(4)]
    found = SqueezeReleaseResult.of(run, networks, 0.06)
    assert found.best.number == 3
    assert found.model is networks[2]
    assert [p.number for p in found.pareto] == [1, 3, 4]
    assert found.reduction == 5.0
    assert SqueezeReleaseResult.of(run, networks, None).best.number == 4
    assert found.to_dict()["pareto"] == [1, 3, 4]


def test_the_model_itself_stays_dense_and_the_outcome_is_repeatable(
    result: SqueezeReleaseResult,
) -> None:
    model, data = perceptron(), blobs()
    again = driver().fit(model, data, data)
    assert [p.shape for p in model.parameters()] == [p.shape for p in perceptron().parameters()]
    assert all(bool((p != 0).all()) for p in model.parameters() if p.dim() > 1)
    assert again.cycles == result.cycles
    for one, other in zip(again.networks, result.networks, strict=True):
        states = one.state_dict(), other.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resuming_gives_the_same_bits(tmp_path: Path, result: SqueezeReleaseResult) -> None:
    data = blobs()
    first = driver(cycles=1, checkpoint=tmp_path).fit(perceptron(), data, data)
    assert first.cycles == result.cycles[:1]
    stages: list[str] = []

    def progress(now: Progress) -> None:
        if now.stage not in stages:
            stages.append(now.stage)

    model = perceptron(seed=5)  # its weights come from the folder
    resumed = driver(checkpoint=tmp_path, resume=True, progress=progress).fit(model, data, data)
    assert stages == ["cycle 2 release", "cycle 2 prune", "cycle 2 finetune"]
    assert resumed.cycles == result.cycles
    assert resumed.dense == result.dense
    states = resumed.networks[-1].state_dict(), result.networks[-1].state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    finished = driver(checkpoint=tmp_path, resume=True).fit(model, data, data)
    assert finished.cycles == result.cycles


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    data = blobs()
    driver(cycles=1, checkpoint=tmp_path).fit(perceptron(), data, data)
    with pytest.raises(ValueError, match="checkpoint must be an empty folder without resume=True"):
        driver(checkpoint=tmp_path).fit(perceptron(), data, data)
    with pytest.raises(ValueError, match="checkpoint must be of the same run, got another tau"):
        driver(checkpoint=tmp_path, resume=True, tau=0.5).fit(perceptron(), data, data)


def test_without_release_zeros_stay_masked() -> None:
    stages: dict[str, set[float]] = {}

    def progress(now: Progress) -> None:
        stages.setdefault(now.stage, set()).add(round(now.sparsity, 6))

    found = fit(release=False, progress=progress)
    assert "cycle 2 train" in stages
    assert "cycle 2 release" not in stages
    (kept,) = stages["cycle 2 train"]  # one sparsity all the way
    assert kept == pytest.approx(found.cycles[0].sparsity, abs=1e-5)
    assert found.cycles[1].release_rise is None


def test_scores_loaders_and_optimizers_of_ones_own() -> None:
    x, y = blobs()
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    made: list[torch.optim.Optimizer] = []

    def optimizer_fn(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, lr=0.01))
        return made[-1]

    for score in ("magnitude", "activation", Magnitude()):
        found = driver(score=score, cycles=1).fit(perceptron(), loader, loader, optimizer_fn)
        assert found.cycles[0].metric > 0.8
    assert len(made) == 3 * (1 + 3)  # one to ask for the learning rate, one per phase
    trained = perceptron()
    found = driver(cycles=1).fit(trained, (x, y), (x, y), trained=True)
    assert found.dense.metric < 0.6  # nothing was trained before the cycle


def test_it_stops_when_too_much_is_lost() -> None:
    found = fit(cycles=4, first_sparsity=0.99, max_drop=0.0)
    assert len(found.cycles) < 4
    assert found.best.metric >= found.dense.metric


def test_rules_hold_in_every_cycle() -> None:
    data = blobs()
    found = driver(exclude=["4.*"]).fit(perceptron(), data, data)
    last = found.networks[-1]
    assert bool((last[4].weight != 0).all())
    assert found.dense.nonzeros == 24 * 64 + 64 * 32
    assert set(MaskSet.dense(last)) > {"4.weight"}


def test_dead_units_in_a_residual_stream_go() -> None:
    """Their biases decay, so that the padded depthwise convolution sees zero and not a constant."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 12, 2, stride=2)
            self.spatial = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.hidden = nn.Conv2d(12, 24, 1)
            self.back = nn.Conv2d(24, 12, 1)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x.view(-1, 1, 4, 6))
            y = y + self.back(torch.relu(self.hidden(self.spatial(y))))
            logits: Tensor = self.head(torch.relu(y).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    data = blobs()
    model = Residual()
    found = driver(cycles=1, first_sparsity=0.93, train=TRAIN).fit(model, data, data)
    network = found.networks[0]
    assert network.stem.out_channels < 12
    assert network.hidden.out_channels < 24


def test_layer_norms_lose_channels_cycle_after_cycle() -> None:
    """Of a small ConvNeXt hidden units go, and stream channels through CompensatedLayerNorm."""
    pytest.importorskip("sklearn")
    data = load_digits()
    torch.manual_seed(0)
    model = ConvNeXt((1, 8, 8), 10, widths=(8, 24), depths=(1, 1), patch=2)
    train = TrainConfig(
        epochs=6, lr=5e-3, optimizer="adamw", weight_decay=0.01, batch_size=64, seed=0
    )
    pairs = (
        (data.train_inputs[:700], data.train_labels[:700]),
        (data.test_inputs, data.test_labels),
    )
    found = SqueezeRelease(cycles=2, first_sparsity=0.85, train=train).fit(model, *pairs)
    norms = [
        [m for m in network.modules() if isinstance(m, CompensatedLayerNorm)]
        for network in found.networks
    ]
    widths = [min(norm.kept for norm in layers if norm.total == 24) for layers in norms]
    assert 24 > widths[0] >= widths[1]
    hidden = [network.stages[1][2].project.in_features for network in found.networks]
    assert 96 > hidden[0] > hidden[1]
    assert all(cycle.max_error <= 1e-9 and not cycle.refusals for cycle in found.cycles)
    assert found.cycles[0].metric > 0.5  # 0.1 is chance; this is not about accuracy


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cycles": 0}, "cycles must be at least 1, got 0"),
        ({"first_sparsity": 1.0}, "first_sparsity must be .*got 1.0"),
        ({"first_sparsity": 0.0}, r"first_sparsity must lie in \(0, 1\), got 0.0"),
        ({"nnz_factor": 1.5}, r"nnz_factor must lie in \(0, 1\), got 1.5"),
        ({"score": "size"}, "score must be one of group, activation, magnitude, got 'size'"),
        ({"max_drop": -0.1}, "max_drop must be at least 0 or None, got -0.1"),
        ({"finish": -1}, "finish must be at least 0, got -1"),
        ({"resume": True}, "checkpoint must be a folder with resume=True, got None"),
        ({"phase_epochs": (1, 0, 1)}, "phase_epochs must be three positive counts"),
    ],
)
def test_refusals(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.minimize.SqueezeRelease: {message}"):
        SqueezeRelease(**kwargs)


def test_digits_shrink_threefold() -> None:
    """At least 3x, within 1.5 points, in seconds."""
    pytest.importorskip("sklearn")
    data = load_digits()
    torch.manual_seed(0)
    model = mlp(64, 10, (300, 100))
    train = TrainConfig(epochs=16, lr=0.1, batch_size=64, seed=0)
    pairs = (data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)
    found = SqueezeRelease(cycles=3, train=train).fit(copy.deepcopy(model), *pairs)
    last = found.cycles[-1]
    assert found.dense.parameters >= 3 * last.parameters
    assert last.metric >= found.dense.metric - 0.015
