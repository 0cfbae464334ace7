"""The pruner and optimizers: zeros that stay, scalers, closures, foreign state."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood.pruning import (
    Cubic,
    Linear,
    OneShot,
    Pruner,
    Schedule,
)
from sapwood.pruning._bits import clear_, keep_bits

from .toy import LAST, OPTIMIZERS, T1, Restless, assert_masked, loss_of, network, train_step


@pytest.mark.parametrize("schedule", [Linear(0.8, t1=T1, every=2), Cubic(0.8, t1=T1, every=2)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_weights_stay_zero(kind: str, schedule: Schedule) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    pruner = Pruner(model, schedule).attach(optimizer)
    for step in range(1, LAST + 1):
        train_step(model, optimizer, step)
        assert_masked(pruner, model, optimizer if step >= T1 or schedule.monotone else None)
        if step % 2 == 0:
            off = round(pruner.schedule.sparsity(min(step, T1)) * 176)
            assert sum(n - kept for kept, n in pruner.masks.counts().values()) == off
    assert pruner.finished
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam-foreach"])
def test_on_update_is_enough_for_optimizers_that_keep_zeros(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=T1, every=2), enforce="on_update").attach(optimizer)
    for step in range(1, LAST + 1):
        train_step(model, optimizer, step)
        assert_masked(pruner, model, optimizer)


def test_on_update_notices_what_revives_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.pruning.pruner._CHECK_EVERY", 5)
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    Pruner(model, OneShot(0.8), enforce="on_update").attach(optimizer)
    for step in range(4):
        train_step(model, optimizer, step)
    model[0].weight.data.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"must stay zero .* got others in 0\.weight"):
        train_step(model, optimizer, 4)


def test_on_update_is_refused_where_it_is_not_safe() -> None:
    model = network()
    pruner = Pruner(model, OneShot(0.5), enforce="on_update")
    with pytest.raises(ValueError, match=r"must be SGD, Adam or AdamW .*, got RMSprop"):
        pruner.attach(OPTIMIZERS["rmsprop"](list(model.parameters())))
    with pytest.raises(ValueError, match="enforce must be 'always' without mask_gradients"):
        Pruner(model, OneShot(0.5), enforce="on_update", mask_gradients=False)


def test_weights_without_gradients_masking_are_still_zero() -> None:
    model = network()
    optimizer = OPTIMIZERS["adam"](list(model.parameters()))
    pruner = Pruner(model, OneShot(0.7), mask_gradients=False).attach(optimizer)
    for step in range(4):
        train_step(model, optimizer, step)
        assert_masked(pruner, model)


def test_gradients_are_masked_before_clipping() -> None:
    model = network()
    pruner = Pruner(model, OneShot(0.9)).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model, 0).backward()
    pruner.mask_gradients()
    kept = [p.grad[pruner.masks[n]] for n, p in model.named_parameters() if n in pruner.masks]
    rest = [p.grad.flatten() for n, p in model.named_parameters() if n not in pruner.masks]
    expected = torch.cat([part.flatten() for part in kept + rest]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closures_see_masked_gradients(as_keyword: bool) -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=T1, every=2)).attach(optimizer)
    for step in range(LAST):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        _ = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert_masked(pruner, model, optimizer)


def test_lbfgs_keeps_zeros() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    pruner = Pruner(model, Linear(0.8, t1=3, every=1)).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            optimizer.step(closure)
            assert_masked(pruner, model)


def test_factored_state_is_left_alone_with_one_warning() -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    pruner = Pruner(model, Linear(0.8, t1=4, every=1)).attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            train_step(model, optimizer, step)
            assert_masked(pruner, model)
    texts = [str(w.message) for w in caught if "left alone" in str(w.message)]
    assert len(texts) == 1
    assert "col_var" in texts[0]
    assert "Adafactor" in texts[0]


@pytest.mark.parametrize("schedule", [Linear(0.8, t1=T1, every=2), Cubic(0.8, t1=T1, every=2)])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop-foreach"])
def test_autocast_keeps_zeros(kind: str, schedule: Schedule) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    pruner = Pruner(model, schedule).attach(optimizer)
    for step in range(1, LAST + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        assert_masked(pruner, model, optimizer if step >= T1 or schedule.monotone else None)
    assert pruner.masks.sparsity() == 141 / 176


def test_overflow_of_float16_skips_steps_of_the_schedule_too() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Cubic(0.8, t1=T1, every=2)).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    skipped = 0
    for step in range(3 * LAST):
        before = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        assert pruner.step_count == step + 1 - skipped
        assert_masked(pruner, model)
    assert skipped >= 2
    assert pruner.finished
    assert_masked(pruner, model, optimizer)


@pytest.mark.parametrize("kind", ["sgd", "adamw-fused"])
def test_steps_that_a_scaler_skips_do_not_count(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=4, every=1)).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step % 2:
            model[0].weight.grad[pruner.masks["0.weight"]] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert pruner.step_count == step // 2 + 1
        assert_masked(pruner, model, optimizer)
    assert pruner.finished


def test_a_step_within_a_step_counts_once() -> None:
    model = network()
    OPTIMIZERS["sgd"](list(model.parameters()))  # lets torch call the hooks for the base class too
    optimizer = Restless(model.parameters(), lr=0.1)
    pruner = Pruner(model, Linear(0.8, t1=T1, every=2)).attach(optimizer)
    for step in range(1, LAST + 1):
        train_step(model, optimizer, step)
        assert pruner.step_count == step
        assert_masked(pruner, model)


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=4, every=1)).attach(optimizer)
    for step in range(8):
        loss_of(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.step_count == 4
    assert_masked(pruner, model, optimizer)


def test_several_optimizers_share_one_clock() -> None:
    model = network()
    body = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    head = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, Linear(0.8, t1=4, every=1)).attach(body).attach(head)
    for step in range(1, 8):
        model.zero_grad()
        loss_of(model, step).backward()
        body.step()
        head.step()
        assert pruner.step_count == step
        assert_masked(pruner, model, body)
        assert_masked(pruner, model, head)


def test_two_parameter_groups_and_foreign_parameters() -> None:
    model, other = network(), nn.Linear(3, 3)
    groups: list[dict[str, Any]] = [
        {"params": model.parameters()},
        {"params": other.parameters(), "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    pruner = Pruner(model, OneShot(0.5)).attach(optimizer)
    before = other.weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        (loss_of(model, step) + other(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
    assert_masked(pruner, model, optimizer)
    assert not torch.equal(other.weight.detach(), before)
    assert int((other.weight == 0).sum()) == 0


def test_master_copies_are_ranked_and_masked() -> None:
    layer = nn.Linear(4, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    master = torch.tensor([[1.0, 1.003, 0.999, 1.001]])
    assert torch.equal(master.bfloat16(), layer.weight.detach())
    optimizer.state[layer.weight]["master_param"] = master
    pruner = Pruner(layer, OneShot(0.5)).attach(optimizer)
    assert pruner.masks["weight"].tolist() == [[False, True, False, True]]
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    torch.testing.assert_close(master, torch.tensor([[0.0, 1.003, 0.0, 1.001]]))


def test_bad_optimizers() -> None:
    pruner = Pruner(network(), OneShot(0.5))
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer, got 3"):
        pruner.attach(3)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    pruner.attach(optimizer)
    with pytest.raises(ValueError, match="must not be attached yet, got it twice"):
        pruner.attach(optimizer)


@pytest.mark.parametrize("full_width", [1 << 18, 0], ids=["words", "bytes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clearing_leaves_positive_zeros_in_every_type_and_layout(
    dtype: torch.dtype, full_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapwood.pruning._bits.FULL_WIDTH", full_width)
    values = torch.tensor([math.nan, -math.inf, math.inf, -0.0, -1.0, 1e-7, 3.0, -2.5])
    mask = torch.rand(2, 8, 3, 5) < 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        tensor = values.to(dtype).view(1, 8, 1, 1).repeat(2, 1, 3, 5).to(memory_format=layout)
        expected = tensor.clone().masked_fill(~mask, 0.0)
        clear_(tensor, keep_bits(mask, tensor))
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(tensor.view(integer), expected.view(integer))
        narrow = torch.full_like(tensor, -1.0, dtype=torch.bfloat16)
        clear_(narrow, keep_bits(mask, tensor))
        assert torch.equal(narrow, torch.where(mask, -1.0, 0.0).bfloat16())


def test_a_failed_attach_leaves_nothing_behind() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, OneShot(0.5))
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"score 0\.weight must hold numbers, got 1 NaN values"):
        pruner.attach(optimizer)
    assert pruner.masks.sparsity() == 0.0
    model[0].weight.data[0, 0] = 1.0
    pruner.attach(optimizer)
    train_step(model, optimizer, 0)
    assert pruner.step_count == 1
    assert_masked(pruner, model, optimizer)
