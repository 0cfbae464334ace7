"""What is said about packed networks is what was measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sapwood import nn as sparse_nn
from sapwood.cli import console, packing
from sapwood.cli.packing import Timing
from sapwood.pruning import prune


@pytest.fixture(name="model")
def pruned_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))
    prune(model, 0.95, scope="layer")
    return model.eval()


def timing(batch: int, dense: float, packed: float, undisturbed: float = 1.0) -> Timing:
    seconds = {"dense": dense, "p": packed}
    return Timing(batch, seconds, seconds, undisturbed)


@pytest.fixture(name="bars")
def silent_bars() -> Iterator[console.Bars]:
    with console.bars() as bars:
        yield bars


def test_packed_copy_agrees_and_the_original_stays(model: nn.Module) -> None:
    x = torch.randn(50, 64)
    packed = packing.pack(model, x)
    with torch.no_grad():
        difference = float((packed.model(x) - model(x)).abs().max())
    assert packed.max_difference == difference
    assert packed.same_predictions == packed.predictions == 50
    assert all(type(layer) is not sparse_nn.SparseLinear for layer in model)
    assert [layer.report.shape for layer in packed.layers] == [(512, 64), (512, 512), (10, 512)]
    assert packed.layers[1].report.packed
    assert set(packed.layers[1].formats.values()) <= {"dense", "bitmap", "csr", "sell"}
    assert packed.layers[1].formats[64] != "dense"


def test_wrong_packed_output_is_an_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    to_sparse = sparse_nn.to_sparse

    def broken(network: nn.Sequential) -> list[sparse_nn.LayerReport]:
        rows = to_sparse(network)
        with torch.no_grad():
            network[2].values.mul_(1.01)
        return rows

    monkeypatch.setattr(sparse_nn, "to_sparse", broken)
    with pytest.raises(ArithmeticError, match="packed and masked outputs differ by"):
        packing.pack(model, torch.randn(50, 64))


def test_timings_take_turns_and_cover_the_batches(model: nn.Module, bars: console.Bars) -> None:
    models = {"dense": model, "p": model}
    timings = packing.time_models(models, torch.randn(20, 64), bars, seconds=0)
    assert [t.batch for t in timings] == list(packing.BATCHES)
    for t in timings:
        assert 0 < t.best["p"] <= t.median["p"]
        assert t.speedup("p") == t.best["dense"] / t.best["p"]
        assert 0 <= t.undisturbed <= 1


def test_disturbed_measurement_is_repeated_and_the_best_kept(
    model: nn.Module, bars: console.Bars, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.3, 0.95, 0.5, 0.7, 0.6, 1.0])  # batch 1: twice, 64: three times, 256: once
    clock = iter(range(100))

    def attempt(calls: object, batch: int, seconds: float) -> Timing:
        return timing(batch, 1.0, 1.0, next(shares))

    monkeypatch.setattr(packing, "_attempt", attempt)
    monkeypatch.setattr(packing.time, "perf_counter", lambda: next(clock))
    timings = packing.time_models({"dense": model}, torch.randn(20, 64), bars, seconds=1)
    assert [t.undisturbed for t in timings] == [0.95, 0.7, 1.0]


def test_disturbance_is_stated() -> None:
    assert packing.remarks([timing(64, 2.0, 1.0, 0.7)], ["p"]) == [
        "Other programs used the processor during the timing: the figures at batch 64 are rough."
    ]


def test_time_lost_to_others_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"dense": lambda: None}
    for lost, expected in ((0.0, True), (100.0, False)):
        ticks = iter([0.0, lost])
        monkeypatch.setattr(packing, "_seconds_lost", lambda ticks=ticks: next(ticks))
        assert packing.quiet(packing._attempt(calls, 1, 0)) is expected


def test_lost_time_only_grows() -> None:
    before = packing._seconds_lost()
    sum(range(10**6))
    assert packing._seconds_lost() >= before >= 0


def test_remarks_name_every_batch_that_gained_nothing() -> None:
    timings = [timing(1, 1.0, 1.25), timing(64, 1.0, 0.99), timing(256, 5.0, 1.0)]
    assert packing.remarks(timings, ["p"]) == [
        "Not faster than dense here: p at batch 1 (0.80x), p at batch 64 (1.01x)."
    ]
    assert packing.remarks(timings[2:], ["p"]) == []


@pytest.mark.parametrize(
    ("speedup", "text"),
    [(0.8, "0.80x"), (1.04, "1.04x"), (1.5, "1.5x"), (9.94, "9.9x"), (9.96, "10x"), (31.4, "31x")],
)
def test_ratio(speedup: float, text: str) -> None:
    assert packing.ratio(speedup) == text
