"""An interrupted recipe that goes on ends with the bits of one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sapwood.pruning import (
    DynamicSparseTraining,
    LotteryTicket,
    Magnitude,
    ProgressiveMagnitude,
    PruneAtInit,
    PruneFinetuneConfig,
    PruningResult,
    TrainConfig,
    TrainPruneFinetune,
)

SGD = TrainConfig(epochs=3, lr=0.1, batch_size=16)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01)
EXTRAS = replace(SGD, ema=0.9, grad_clip=0.5, amp="bf16")
Make = Callable[..., Any]

RECIPES: dict[str, Make] = {
    "dense": lambda **o: ProgressiveMagnitude(None, SGD, **o),
    "linear-sgd": lambda **o: ProgressiveMagnitude(0.8, SGD, every=2, **o),
    "linear-adamw": lambda **o: ProgressiveMagnitude(0.8, ADAMW, every=2, **o),
    "cubic-sgd": lambda **o: ProgressiveMagnitude(0.8, SGD, schedule="cubic", every=2, **o),
    "cubic-adamw": lambda **o: ProgressiveMagnitude(0.8, ADAMW, schedule="cubic", every=2, **o),
    "extras": lambda **o: ProgressiveMagnitude(0.8, EXTRAS, every=2, **o),
    "snip-sgd": lambda **o: PruneAtInit(0.8, SGD, **o),
    "rigl-sgd": lambda **o: DynamicSparseTraining(0.8, SGD, every=2, **o),
    "rigl-adamw": lambda **o: DynamicSparseTraining(0.8, ADAMW, every=2, **o),
    "lth-sgd": lambda **o: LotteryTicket(0.36, SGD, **o),
    "lth-adamw": lambda **o: LotteryTicket(0.36, ADAMW, **o),
    "lth-rewind": lambda **o: LotteryTicket(0.36, SGD, rewind_step=7, **o),
    "tpf": lambda **o: TrainPruneFinetune(PruneFinetuneConfig(SGD, (0.5, 0.8)), **o),
    "tpf-weights": lambda **o: TrainPruneFinetune(
        PruneFinetuneConfig(ADAMW, (0.5, 0.8), rewind="weights", rewind_step=4), **o
    ),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def problem(rows: int = 72) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Noisy(TensorDataset):
    """Augments at random, as an image data set would."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


class Stop:
    """Interrupts a run after so many steps, counted over all stages."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, progress: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def last(outcome: PruningResult | list[PruningResult]) -> PruningResult:
    return outcome[-1] if isinstance(outcome, list) else outcome


def assert_same(left: PruningResult, right: PruningResult) -> None:
    pairs = [(left.model, right.model)]
    if left.averaged is not None:
        assert right.averaged is not None
        pairs.append((left.averaged, right.averaged))
    for a, b in pairs:
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    assert left.masks == right.masks
    assert left.history == right.history
    assert left.steps == right.steps


@pytest.mark.parametrize("stop", [1, 4, 7, 13])
@pytest.mark.parametrize("name", RECIPES)
def test_resume_is_exact(name: str, stop: int, tmp_path: Path) -> None:
    data = problem()
    whole = last(RECIPES[name]().fit(network(), data, data))
    with pytest.raises(KeyboardInterrupt):
        RECIPES[name](checkpoint=tmp_path / "run", progress=Stop(stop)).fit(network(), data, data)
    # the second process has another initialisation: everything must come from the folder
    again = RECIPES[name](checkpoint=tmp_path / "run", resume=True)
    assert_same(whole, last(again.fit(network(seed=9), data, data)))


@pytest.mark.parametrize("name", ["lth-sgd", "lth-rewind", "tpf", "tpf-weights"])
def test_resume_in_a_later_stage(name: str, tmp_path: Path) -> None:
    data = problem()
    whole = RECIPES[name]()
    whole.fit(network(), data, data)
    for stop in (17, 4, 9):  # three interruptions, each some steps after the last one
        with pytest.raises(KeyboardInterrupt):
            RECIPES[name](checkpoint=tmp_path, resume=True, progress=Stop(stop)).fit(
                network(), data, data
            )
    again = RECIPES[name](checkpoint=tmp_path, resume=True)
    again.fit(network(seed=9), data, data)
    assert_same(whole.result_, again.result_)
    assert [r.history for r in whole.results_] == [r.history for r in again.results_]
    assert [r.masks for r in whole.results_] == [r.masks for r in again.results_]


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resume_with_a_loader_that_augments(stop: int, tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Noisy(*problem()), batch_size=16, shuffle=True)

    plain = DataLoader(TensorDataset(*problem()), batch_size=16)
    whole = RECIPES["linear-sgd"]().fit(network(), loader(), plain)
    with pytest.raises(KeyboardInterrupt):
        RECIPES["linear-sgd"](checkpoint=tmp_path, progress=Stop(stop)).fit(
            network(), loader(), plain
        )
    again = RECIPES["linear-sgd"](checkpoint=tmp_path, resume=True)
    assert_same(whole, again.fit(network(seed=9), loader(), plain))


def test_without_an_interruption_too_the_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    """A crash leaves the periodic checkpoint only."""
    data = problem()
    whole = RECIPES["cubic-sgd"]().fit(network(), data, data)
    seen: list[int] = []

    class Crash(Exception):
        pass

    def crash(*_: object) -> Tensor:
        seen.append(1)
        if len(seen) == 9:
            raise Crash
        return nn.functional.cross_entropy(*_)  # type: ignore[arg-type]

    recipe = RECIPES["cubic-sgd"](checkpoint=tmp_path, checkpoint_every=3, loss_fn=crash)
    with pytest.raises(Crash):
        recipe.fit(network(), data, data)
    steps: list[int] = []
    again = RECIPES["cubic-sgd"](
        checkpoint=tmp_path, resume=True, progress=lambda progress: steps.append(progress.step)
    )
    assert_same(whole, again.fit(network(seed=9), data, data))
    assert steps[0] == 7


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    data = problem()
    done = RECIPES["extras"](checkpoint=tmp_path).fit(network(), data, data)
    assert [file.name for file in tmp_path.iterdir()] == ["stage-00.safetensors"]
    steps: list[object] = []
    again = RECIPES["extras"](checkpoint=tmp_path, resume=True, progress=steps.append)
    result = again.fit(network(seed=9), data, data)
    assert steps == []
    assert_same(done, result)
    assert result.report is not None
    assert result.report.digest == done.report.digest


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    data = problem()
    RECIPES["dense"](checkpoint=tmp_path).fit(network(), data, data)
    before = (tmp_path / "stage-00.safetensors").read_bytes()
    text = r"checkpoint must be a folder without an earlier run, got stage-00.safetensors in"
    with pytest.raises(ValueError, match=text):
        RECIPES["linear-sgd"](checkpoint=tmp_path).fit(network(), data, data)
    assert (tmp_path / "stage-00.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda **o: ProgressiveMagnitude(0.7, SGD, every=2, **o), "sparsity = 0.8 instead of 0.7"),
        (lambda **o: ProgressiveMagnitude(0.8, ADAMW, every=2, **o), r"got train\.lr = 0\.1"),
        (lambda **o: PruneAtInit(0.8, SGD, **o), "recipe = 'ProgressiveMagnitude' instead of"),
        (
            lambda **o: ProgressiveMagnitude(0.8, SGD, every=2, criterion=Magnitude(p=2), **o),
            "got criterion = 'magnitude' instead of",
        ),
    ],
    ids=["sparsity", "config", "recipe", "criterion"],
)
def test_a_foreign_run_is_refused(other: Make, text: str, tmp_path: Path) -> None:
    data = problem()
    with pytest.raises(KeyboardInterrupt):
        RECIPES["linear-sgd"](checkpoint=tmp_path, progress=Stop(3)).fit(network(), data, data)
    model = network()
    with pytest.raises(ValueError, match=f"must be of the same run, got .*{text}|{text}"):
        other(checkpoint=tmp_path, resume=True).fit(model, data, data)
    for a, b in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_model_is_refused(tmp_path: Path) -> None:
    data = problem()
    with pytest.raises(KeyboardInterrupt):
        RECIPES["linear-sgd"](checkpoint=tmp_path, progress=Stop(3)).fit(network(), data, data)
    wide = nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 3))
    text = r"got parameters\.0\.weight = \[16, 8\] instead of \[17, 8\]"
    with pytest.raises(ValueError, match=text):
        RECIPES["linear-sgd"](checkpoint=tmp_path, resume=True).fit(wide, data, data)


def test_data_of_another_length_are_refused(tmp_path: Path) -> None:
    data = problem()
    with pytest.raises(KeyboardInterrupt):
        RECIPES["linear-sgd"](checkpoint=tmp_path, progress=Stop(3)).fit(network(), data, data)
    with pytest.raises(ValueError, match="batches per epoch = 5 instead of 3"):
        RECIPES["linear-sgd"](checkpoint=tmp_path, resume=True).fit(network(), problem(40), data)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    data = problem()
    with pytest.raises(KeyboardInterrupt):
        RECIPES["linear-sgd"](checkpoint=tmp_path, progress=Stop(3)).fit(network(), data, data)
    path = tmp_path / "running.safetensors"
    content = path.read_bytes()
    body = int.from_bytes(content[:8], "little") + 8
    cases = [content[:n] for n in range(0, len(content), len(content) // 23)]
    for position in [*range(0, body, 53), *range(body, len(content), 211)]:
        flipped = bytes([content[position] ^ 4])
        cases.append(content[:position] + flipped + content[position + 1 :])
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(ValueError, match=r"ProgressiveMagnitude: .* must be"):
            RECIPES["linear-sgd"](checkpoint=tmp_path, resume=True).fit(network(), data, data)
    path.write_bytes(content)
    RECIPES["linear-sgd"](checkpoint=tmp_path, resume=True).fit(network(), data, data)
