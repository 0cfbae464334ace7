"""The pruner in training: zeros that stay, optimizers of all kinds, scalers, averages, wrappers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    Random,
    Schedule,
)

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


def test_linear_masks_nest_and_cubic_ones_may_return() -> None:
    returned = {}
    for schedule in (Linear(0.6, t1=40, every=2), Cubic(0.6, t1=40, every=2)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        pruner = Pruner(model, schedule).attach(optimizer)
        before, count = pruner.masks, 0
        for step in range(40):
            train_step(model, optimizer, step)
            revived = pruner.masks & ~before
            count += sum(kept for kept, _ in revived.counts().values())
            before = pruner.masks
        returned[schedule.kind] = count
    assert returned["linear"] == 0
    assert returned["cubic"] > 0


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


def test_autocast_keeps_zeros() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=T1, every=2)).attach(optimizer)
    for step in range(LAST):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
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


def test_an_average_is_masked_at_each_change() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = Pruner(model, Cubic(0.8, t1=T1, every=2)).attach(optimizer)
    pruner.track(average)
    for step in range(1, LAST + 1):
        train_step(model, optimizer, step)
        if step % 2 == 0:
            assert pruner.masks.check(average) == []
        average.update_parameters(model)
    assert pruner.masks.check(average) == []
    assert pruner.masks.sparsity() == pytest.approx(0.8, abs=1 / 176)
    with pytest.raises(MaskMatchError):
        pruner.track(nn.Linear(2, 2))


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


def test_detach_lets_go() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, OneShot(0.5)).attach(optimizer)
    pruner.detach()
    train_step(model, optimizer, 0)
    assert pruner.step_count == 0
    assert pruner.masks.check(model) != []
    pruner.attach(optimizer)
    train_step(model, optimizer, 1)
    assert_masked(pruner, model, optimizer)


def test_by_hand() -> None:
    model = network()
    pruner = Pruner(model, Linear(0.8, t1=4, every=2, s0=0.2))
    assert [pruner.step() for _ in range(6)] == [True, True, False, True, False, False]
    assert pruner.masks.sparsity() == pytest.approx(0.8, abs=1 / 176)
    assert_masked(pruner, model)
    pruner.attach(OPTIMIZERS["sgd"](list(model.parameters())))
    with pytest.raises(RuntimeError, match="must not be attached, got 1 optimizers"):
        pruner.step()


def test_an_update_at_step_zero_happens_on_attach() -> None:
    for schedule in (OneShot(0.5), Constant(0.5), Linear(0.9, t1=4, every=2, s0=0.5)):
        model = network()
        pruner = Pruner(model, schedule).attach(OPTIMIZERS["adam"](list(model.parameters())))
        assert_masked(pruner, model)
        assert pruner.masks.sparsity() == 0.5


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


def test_nan_weights_are_an_error_that_changes_nothing() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=4, every=2)).attach(optimizer)
    train_step(model, optimizer, 0)
    loss_of(model, 1).backward()
    model[3].weight.data[0, :2] = math.nan
    masks = pruner.masks
    with pytest.raises(ValueError, match=r"score 3\.weight must hold numbers, got 2 NaN values"):
        optimizer.step()
    assert pruner.masks is masks


def test_the_model_stays_plain() -> None:
    model = network()
    keys = list(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=2, every=1)).attach(optimizer)
    for step in range(3):
        train_step(model, optimizer, step)
    assert list(model.state_dict()) == keys
    assert all(p.is_leaf for p in model.parameters())
    twin = copy.deepcopy(model)
    assert pruner.masks.check(twin) == []
    optimizer = OPTIMIZERS["adamw"](list(twin.parameters()))
    second = Pruner(twin, Linear(0.9, t1=2, every=1)).attach(optimizer)
    for step in range(3):
        train_step(twin, optimizer, step)
    assert_masked(second, twin, optimizer)
    assert second.masks.sparsity() == pytest.approx(0.9, abs=1 / 176)
    assert pruner.masks.check(model) == []


def test_compiled_without_graph_breaks() -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = OPTIMIZERS["sgd"](list(compiled.parameters()))
    pruner = Pruner(compiled, Linear(0.8, t1=3, every=1)).attach(optimizer)
    for step in range(5):
        train_step(compiled, optimizer, step)
    assert list(pruner.masks) == ["0.weight", "3.weight"]
    assert_masked(pruner, model, optimizer)
    x, _ = batch(0)
    compiled.eval()
    torch.testing.assert_close(compiled(x), model(x))


def test_parameters_that_are_replaced_are_found_again() -> None:
    model = network()
    pruner = Pruner(model, Linear(0.8, t1=4, every=1))
    pruner.step()
    model[0].weight = nn.Parameter(torch.randn(16, 8))
    pruner.step()
    assert_masked(pruner, model)


def test_tied_weights_are_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    pruner = Pruner(model, OneShot(0.5))
    pruner.step()
    assert pruner.masks.counts() == {"0.weight": (8, 16)}
    assert int((model[1].weight == 0).sum()) == 8


@pytest.mark.parametrize(
    "scope", ["layer", "erk", LayerPlan({"0": 0.9, "3": 0.2})], ids=["layer", "erk", "plan"]
)
def test_scopes_end_exactly(scope: str | LayerPlan) -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.75, t1=T1, every=1), scope=scope).attach(optimizer)
    for step in range(T1):
        train_step(model, optimizer, step)
    assert pruner.masks.sparsity() == 132 / 176
    assert_masked(pruner, model, optimizer)


def test_random_criterion_takes_the_seed() -> None:
    masks = []
    for seed, criterion in ((7, "random"), (0, Random(seed=7)), (8, "random")):
        pruner = Pruner(network(), OneShot(0.5), criterion, seed=seed)
        pruner.step()
        masks.append(pruner.masks)
    assert masks[0] == masks[1] != masks[2]


class NeedsData(Magnitude):
    @property
    def needs_data(self) -> bool:
        return True

    def scores(
        self, model: nn.Module, masks: MaskSet, batch: Any = None, loss_fn: Any = None
    ) -> dict[str, Tensor]:
        assert batch == "a batch"
        return super().scores(model, masks)


def test_criteria_with_data_are_stepped_by_hand() -> None:
    model = network()
    pruner = Pruner(model, OneShot(0.5), NeedsData())
    with pytest.raises(RuntimeError, match=r"criterion must not need data, got NeedsData; call"):
        pruner.attach(OPTIMIZERS["sgd"](list(model.parameters())))
    assert pruner.step("a batch")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"include": ["0.wieght"]}, MaskMatchError, "no match for '0.wieght'; closest names"),
        ({"criterion": "magnitud"}, ValueError, "criterion must be one of"),
        ({"enforce": "never"}, ValueError, "enforce must be 'always' or 'on_update', got 'never'"),
        ({"schedule": 0.9}, TypeError, "schedule must be a Schedule, got 0.9"),
        ({"schedule": Linear(0.5, t1=0.5, every=1)}, ValueError, "total_steps must be given"),
    ],
    ids=["pattern", "criterion", "enforce", "schedule", "fraction"],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Pruner(network(), **{"schedule": OneShot(0.5), **arguments})


def test_bad_optimizers() -> None:
    pruner = Pruner(network(), OneShot(0.5))
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer, got 3"):
        pruner.attach(3)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    pruner.attach(optimizer)
    with pytest.raises(ValueError, match="must not be attached yet, got it twice"):
        pruner.attach(optimizer)
