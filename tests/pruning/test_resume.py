"""Stopping and going on gives the same bits as never stopping."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from sapwood.pruning import (
    Constant,
    Cubic,
    LayerPlan,
    Linear,
    Magnitude,
    MaskMatchError,
    MaskSet,
    OneShot,
    Pruner,
    Schedule,
    prune,
)

from .toy import OPTIMIZERS, network, train_step

STEPS, T1 = 14, 10
SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(0.8, t1=T1, every=3),
    "cubic": Cubic(0.8, t0=1, t1=T1, every=2, s0=0.1),
}


def start(schedule: Schedule, kind: str, **arguments: Any) -> tuple[nn.Module, Optimizer, Pruner]:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    return model, optimizer, Pruner(model, schedule, **arguments).attach(optimizer)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("stop", [1, 5, 11])
@pytest.mark.parametrize("kind", ["sgd", "adamw-foreach"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_resume_is_exact(criterion: str, name: str, kind: str, stop: int, tmp_path: Path) -> None:
    whole, optimizer, pruner = start(SCHEDULES[name], kind, criterion=criterion)
    for step in range(STEPS):
        train_step(whole, optimizer, step)

    first, first_optimizer, first_pruner = start(SCHEDULES[name], kind, criterion=criterion)
    for step in range(stop):
        train_step(first, first_optimizer, step)
    first_pruner.save(tmp_path / "pruner.safetensors")

    second = network(seed=99)
    second.load_state_dict(first.state_dict())
    second_optimizer = OPTIMIZERS[kind](list(second.parameters()))
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_pruner = Pruner.load(tmp_path / "pruner.safetensors", second).attach(second_optimizer)
    assert second_pruner.step_count == stop
    for step in range(stop, STEPS):
        train_step(second, second_optimizer, step)
    assert_same(whole, second)
    assert second_pruner.masks == pruner.masks
    assert second_pruner.finished


def test_state_dict_round_trip() -> None:
    _, optimizer, pruner = start(SCHEDULES["linear"], "sgd")
    model = pruner._model
    for step in range(4):
        train_step(model, optimizer, step)
    state = pruner.state_dict()
    assert all(isinstance(value, (torch.Tensor, str, int, float)) for value in state.values())
    other = Pruner(network(), SCHEDULES["linear"])
    other.load_state_dict(state)
    assert (other.masks, other.step_count) == (pruner.masks, 4)
    kept = state["mask/0.weight"].clone()  # type: ignore[union-attr]
    for step in range(4, STEPS):
        train_step(model, optimizer, step)
    assert torch.equal(state["mask/0.weight"], kept)  # type: ignore[arg-type]


def test_settings_survive_the_file(tmp_path: Path) -> None:
    plan = LayerPlan({"0": 0.5, "3": 0.25})
    pruner = Pruner(
        network(),
        Cubic(0.5, t1=0.5, every=2),
        Magnitude(p=2),
        scope=plan,
        monotone=True,
        min_keep_per_layer=3,
        mask_gradients=False,
        total_steps=40,
        seed=5,
    )
    pruner.step()
    pruner.save(tmp_path / "p")
    loaded = Pruner.load(tmp_path / "p", network())
    assert loaded.settings == pruner.settings
    assert isinstance(loaded.settings.scope, LayerPlan)
    assert loaded.criterion == Magnitude(p=2)
    assert loaded.schedule.state_dict() == pruner.schedule.state_dict()
    assert loaded.schedule.last_update == 20


def test_given_masks_survive_the_file(tmp_path: Path) -> None:
    masks = prune(network(seed=5), 0.9, "random", inplace=False)
    first, optimizer, pruner = start(Constant(0.9), "adamw", masks=masks)
    for step in range(4):
        train_step(first, optimizer, step)
    pruner.save(tmp_path / "fixed")
    second = network(seed=99)
    second.load_state_dict(first.state_dict())
    second_optimizer = OPTIMIZERS["adamw"](list(second.parameters()))
    second_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # both go on
    loaded = Pruner.load(tmp_path / "fixed", second).attach(second_optimizer)
    for step in range(4, 8):
        train_step(first, optimizer, step)
        train_step(second, second_optimizer, step)
    assert_same(first, second)
    assert loaded.masks == pruner.masks == masks


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"schedule": Linear(0.7, t1=T1, every=3)}, "schedule must be this pruner's"),
        ({"criterion": "random"}, "criterion must be this pruner's"),
        ({"scope": "layer"}, "settings must be this pruner's"),
    ],
    ids=["schedule", "criterion", "settings"],
)
def test_another_set_up_is_refused_unless_asked_for(other: dict[str, Any], text: str) -> None:
    source = Pruner(network(), SCHEDULES["linear"])
    source.step()
    target = Pruner(network(), **{"schedule": SCHEDULES["linear"], **other})
    with pytest.raises(ValueError, match=f"load_state_dict: state must fit this pruner: {text}"):
        target.load_state_dict(source.state_dict())
    assert target.step_count == 0
    target.load_state_dict(source.state_dict(), strict=False)
    assert target.step_count == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step_count": -1}, "step_count must be an integer of at least 0, got -1"),
        ({"step_count": 2.5}, "step_count must be an integer"),
        ({"format": "sapwood.pruner/9"}, "format must be 'sapwood.pruner/1'"),
        ({"schedule": None}, "must hold the string 'schedule', got None"),
        ({"settings": "{}"}, "settings must be"),
        ({"criterion": '{"name": 3}'}, "criterion must have a name and parameters"),
        ({"masks": '{"names": []}'}, "masks must name the mask tensors"),
        ({"mask/0.weight": torch.ones(16, 8)}, "mask 0.weight must be a bool tensor"),
        ({"mask/extra": torch.ones(2).bool()}, "masks must name the mask tensors"),
    ],
)
def test_damaged_states(change: dict[str, Any], text: str) -> None:
    pruner = Pruner(network(), SCHEDULES["linear"])
    masks = pruner.masks
    with pytest.raises(ValueError, match=text):
        pruner.load_state_dict({**pruner.state_dict(), **change})
    assert pruner.masks is masks


def test_a_pruner_of_another_model(tmp_path: Path) -> None:
    pruner = Pruner(network(), SCHEDULES["linear"])
    pruner.save(tmp_path / "p")
    with pytest.raises(MaskMatchError, match=r"got no parameter for '0\.weight', '3\.weight'"):
        Pruner.load(tmp_path / "p", nn.Linear(3, 3))
    wide = nn.Sequential(nn.Linear(8, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 3))
    text = r"0\.weight must have the parameter's shape \(17, 8\), got a mask of \(16, 8\)"
    with pytest.raises(ValueError, match=text):
        Pruner.load(tmp_path / "p", wide)
    with pytest.raises(ValueError, match=text):
        Pruner(wide, SCHEDULES["linear"]).load_state_dict(pruner.state_dict())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    pruner = Pruner(network(), SCHEDULES["linear"])
    path = tmp_path / "p"
    pruner.save(path)
    content = path.read_bytes()
    cases = [content[:n] for n in range(0, len(content), 97)]
    for position in range(0, len(content), 41):
        flipped = bytes([content[position] ^ 4])
        cases.append(content[:position] + flipped + content[position + 1 :])
    model = network()
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(ValueError, match=r"Pruner\.load: .* must be an intact pruner file"):
            Pruner.load(path, model)
    MaskSet.dense(model).save(path)
    with pytest.raises(ValueError, match="must be an intact pruner file"):
        Pruner.load(path, model)


class Unregistered(Magnitude):
    pass


class Stairs(OneShot):
    kind = "stairs"


def test_own_criteria_and_schedules_are_handed_over_again(tmp_path: Path) -> None:
    model = network()
    Pruner(model, OneShot(0.5), Unregistered()).save(tmp_path / "criterion")
    with pytest.raises(ValueError, match="criterion must be given for this file, got None"):
        Pruner.load(tmp_path / "criterion", model)
    assert Pruner.load(tmp_path / "criterion", model, criterion=Unregistered()).step_count == 0
    Pruner(model, Stairs(0.5)).save(tmp_path / "schedule")
    with pytest.raises(ValueError, match="kind must be one of"):
        Pruner.load(tmp_path / "schedule", model)
    assert Pruner.load(tmp_path / "schedule", model, schedule=Stairs(0.5)).step_count == 0
