"""RigL in a training run: resumption, clipping, scalers, closures, several optimizers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood.pruning import (
    LayerPlan,
    Linear,
    MaskSet,
    Pruner,
    RigL,
)

from .toy import OPTIMIZERS, assert_masked, loss_of, network, train_step

STEPS, EVERY = 16, 3  # updates after 3, 6, 9 of the 12 steps before t_end


@pytest.mark.parametrize("stop", [2, 6, 11])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_resume_is_exact(grow: Any, kind: str, stop: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"every": EVERY, "total_steps": STEPS, "grow": grow, "seed": 4}

    def start() -> tuple[nn.Module, Optimizer, RigL]:
        model = network()
        optimizer = OPTIMIZERS[kind](list(model.parameters()))
        pruner = RigL(model, 0.7, **arguments)
        pruner.attach(optimizer)
        return model, optimizer, pruner

    whole, optimizer, pruner = start()
    for step in range(STEPS):
        train_step(whole, optimizer, step)

    first, first_optimizer, first_pruner = start()
    for step in range(stop):
        train_step(first, first_optimizer, step)
    first_pruner.save(tmp_path / "rigl")
    second = network(seed=99)
    second.load_state_dict(first.state_dict())
    second_optimizer = OPTIMIZERS[kind](list(second.parameters()))
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_pruner = RigL.load(tmp_path / "rigl", second)
    assert type(second_pruner) is RigL
    assert second_pruner.step_count == stop
    assert second_pruner.state_dict().keys() == first_pruner.state_dict().keys()
    second_pruner.attach(second_optimizer)
    for step in range(stop, STEPS):
        train_step(second, second_optimizer, step)
    assert second_pruner.masks == pruner.masks
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len({first_pruner.masks.digest(), pruner.masks.digest()}) == (1 if stop == 11 else 2)


def test_files_know_what_wrote_them(tmp_path: Path) -> None:
    plan = LayerPlan({"0": 0.6, "3": 0.4})
    source = RigL(network(), 0.5, init=plan, every=2, t_end=7, total_steps=9, min_keep_per_layer=4)
    source.save(tmp_path / "rigl")
    loaded = Pruner.load(tmp_path / "rigl", network())
    assert type(loaded) is RigL
    assert loaded.settings == source.settings
    assert loaded.schedule.state_dict() == source.schedule.state_dict()
    assert loaded.masks == source.masks
    other = RigL(network(), 0.5, init=plan, every=2, t_end=7, total_steps=9, min_keep_per_layer=4)
    other.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="schedule must be this pruner's"):
        RigL(network(), 0.5, init=plan, every=3, total_steps=9).load_state_dict(source.state_dict())
    Pruner(network(), Linear(0.5, t1=3, every=1)).save(tmp_path / "plain")
    text = r"RigL\.load: .* must be a file of this class, got one with schedule Linear\("
    with pytest.raises(ValueError, match=text):
        RigL.load(tmp_path / "plain", network())


@pytest.mark.parametrize("by_hand", [False, True])
def test_clipping_does_not_hide_the_gradients(by_hand: bool) -> None:
    results = []
    for clipped in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = RigL(model, 0.7, every=2, total_steps=20)
        if not by_hand:
            pruner.attach(optimizer)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if clipped:
                pruner.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                assert all(
                    int(model.get_parameter(name).grad[~mask].count_nonzero()) == 0
                    for name, mask in pruner.masks.items()
                )
            optimizer.step()
            if by_hand:
                pruner.step()
        results.append(pruner.masks)
    assert results[0] == results[1]


@pytest.mark.parametrize("order", ["body first", "head first"])
def test_two_optimizers(order: str) -> None:
    model = network()
    body = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    head = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9)
    gradients = {}
    pruner = RigL(model, 0.7, every=2, total_steps=20, alpha=0.6).attach(body).attach(head)
    counts = pruner.masks.counts()
    for step in range(1, 9):
        model.zero_grad()
        loss_of(model, step).backward()
        gradients = {n: model.get_parameter(n).grad.clone() for n in pruner.masks}
        before = pruner.masks
        for optimizer in (body, head) if order == "body first" else (head, body):
            optimizer.step()
        assert pruner.step_count == step
        assert pruner.masks.counts() == counts
        assert_masked(pruner, model, body)
        assert_masked(pruner, model, head)
        for name, mask in before.items():
            grown = pruner.masks[name] & ~mask
            rest = ~pruner.masks[name] & ~mask
            if bool(grown.any()):
                assert gradients[name].abs()[grown].min() >= gradients[name].abs()[rest].max()


@pytest.mark.parametrize("kind", ["sgd", "adamw-fused"])
def test_a_step_that_the_scaler_skips_moves_nothing(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    pruner = RigL(model, 0.7, every=2, total_steps=12, alpha=0.6).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    updates = 0
    for step in range(12):
        before, count = pruner.masks, pruner.step_count
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        skipped = count % 2 == 1 and step % 4 == 1
        if skipped:  # at an update, with the copy of the gradients taken already
            model[0].weight.grad.fill_(math.inf)
            pruner.mask_gradients()
        scaler.step(optimizer)
        scaler.update()
        assert pruner.step_count == count + (not skipped)
        updates += pruner.masks != before
        assert pruner.masks == before or not skipped
        assert_masked(pruner, model, optimizer)
    assert updates >= 3


def test_closures() -> None:
    results = []
    for with_closure in (False, True):
        model = network()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        pruner = RigL(model, 0.7, every=2, total_steps=20).attach(optimizer)
        for step in range(8):

            def closure(step: int = step, model: nn.Module = model) -> Tensor:
                model.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            assert_masked(pruner, model, optimizer)
        results.append(pruner.masks)
    assert results[0] == results[1]


def test_a_tensor_without_gradient_stays() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    pruner = RigL(model, 0.7, every=1, total_steps=9, alpha=1.0).attach(optimizer)
    before = pruner.masks
    for step in range(3):
        train_step(model, optimizer, step)
    assert torch.equal(before["0.weight"], pruner.masks["0.weight"])
    assert not torch.equal(before["3.weight"], pruner.masks["3.weight"])


def test_missing_and_damaged_gradients_change_nothing() -> None:
    model = network()
    pruner = RigL(model, 0.7, every=1, total_steps=9)
    before = pruner.masks
    with pytest.raises(RuntimeError, match="gradients must be there at an update, got none; call"):
        pruner.step()
    loss_of(model, 0).backward()
    model[3].weight.grad[~before["3.weight"]] = math.nan
    with pytest.raises(ValueError, match=r"score 3\.weight must hold numbers, got \d+ NaN"):
        pruner.step()
    assert pruner.masks is before


def test_master_copies_are_ranked() -> None:
    layer = nn.Linear(4, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    master = torch.tensor([[1.0, 1.003, 0.999, 1.001]])
    optimizer.state[layer.weight]["master_param"] = master
    masks = MaskSet({"weight": torch.tensor([[True, True, True, False]])})
    RigL(layer, 0.25, init=masks, every=1, alpha=1.0, total_steps=5).attach(optimizer)
    layer.weight.grad = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).bfloat16()
    optimizer.step()
    torch.testing.assert_close(master, torch.tensor([[1.0, 1.003, 0.0, 0.0]]))


def test_an_average_and_a_copy_follow() -> None:
    model = network()
    average = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    pruner = RigL(model, 0.7, every=2, total_steps=12).attach(optimizer)
    pruner.track(average)
    for step in range(1, 9):
        average.load_state_dict(network(seed=step).state_dict())
        train_step(model, optimizer, step)
        assert (pruner.masks.check(average) == []) == (step % 2 == 0)
    report = pruner.report()
    assert report.sparsity_by_mask == 123 / 176
    assert not any(tensor.revived for tensor in report.tensors)
