"""The pruner: updates, averages, wrappers, replaced and tied parameters, arguments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    prune,
)

from .toy import LAST, OPTIMIZERS, T1, assert_masked, batch, loss_of, network, train_step


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


@pytest.mark.parametrize("decay", [0.9, None], ids=["ema", "swa"])
def test_an_average_is_masked_at_each_change(decay: float | None) -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    ema = None if decay is None else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, multi_avg_fn=ema)
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


class NeverAsked(Magnitude):
    def scores(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise AssertionError("nothing was to be selected")


class Asked(Magnitude):
    def scores(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(self)
        return super().scores(*args, **kwargs)


asked: list[Asked] = []


def test_magnitudes_are_ranked_without_a_copy_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    for criterion in (Asked(), Magnitude()):
        if type(criterion) is Magnitude:
            monkeypatch.setattr(Magnitude, "scores", NeverAsked.scores)
        model = network()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        pruner = Pruner(model, Cubic(0.8, t1=T1, every=2), criterion).attach(optimizer)
        for step in range(T1):
            train_step(model, optimizer, step)
        masks.append(pruner.masks)
    assert masks[0] == masks[1]
    assert len(asked) == 1 + T1 // 2


def ticket() -> MaskSet:
    """158 of 176 weights off: what 90 % rounds to."""
    return prune(network(seed=5), 0.9, "random", inplace=False)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
def test_fixed_masks_stay_as_they_are(kind: str) -> None:
    masks, model = ticket(), network()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    for step in range(3):
        train_step(model, optimizer, step)  # leaves state everywhere
    pruner = Pruner(model, Constant(0.9), NeverAsked(), masks=masks).attach(optimizer)
    assert_masked(pruner, model, optimizer)
    for step in range(LAST):
        train_step(model, optimizer, step)
        assert_masked(pruner, model, optimizer)
    assert pruner.masks == masks
    assert pruner.masks.sparsity() == 158 / 176
    assert pruner.finished


def test_a_schedule_goes_on_from_given_masks() -> None:
    masks, model = prune(network(seed=5), 0.5, "random", inplace=False), network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, Linear(0.8, t1=T1, every=1), masks=masks).attach(optimizer)
    assert_masked(pruner, model)
    for step in range(1, T1 + 1):
        train_step(model, optimizer, step)
        off = max(88, round(pruner.schedule.sparsity(step) * 176))
        assert sum(n - kept for kept, n in pruner.masks.counts().values()) == off
        assert (pruner.masks & ~masks).sparsity() == 1.0


def test_given_masks_are_applied_by_hand_too() -> None:
    model = network()
    pruner = Pruner(model, Constant(0.9), masks=ticket())
    assert pruner.masks.check(model) != []
    assert pruner.step() is False
    assert_masked(pruner, model)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"masks": {}}, TypeError, "masks must be a MaskSet, got dict"),
        ({"masks": MaskSet({})}, ValueError, "masks must hold at least one mask, got none"),
        (
            {"masks": MaskSet({"9.weight": torch.ones(2).bool()})},
            MaskMatchError,
            r"every mask must belong to a parameter of the model, .* '9\.weight'",
        ),
        (
            {"masks": MaskSet({"3.weight": torch.ones(2).bool()})},
            ValueError,
            r"3\.weight must have the parameter's shape \(3, 16\), got a mask of \(2,\)",
        ),
        (
            {"masks": MaskSet({"1.num": torch.ones(2).bool()})},
            TypeError,
            r"1\.num must be floating point, got torch\.int64",
        ),
        (
            {"masks": ticket(), "include": ["0.*"]},
            ValueError,
            r"include must be None when masks are given, got \['0\.\*'\]",
        ),
        (
            {"masks": ticket(), "exclude": []},
            ValueError,
            r"exclude must be None when masks are given, got \[\]",
        ),
    ],
    ids=["type", "empty", "name", "shape", "integer", "include", "exclude"],
)
def test_masks_that_do_not_fit(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = network()
    model[1].num = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(error, match=rf"sapwood\.pruning\.Pruner: {text}"):
        Pruner(model, OneShot(0.5), **arguments)


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
        ({"scope": "block"}, ValueError, "scope must be one of .* or a LayerPlan, got 'block'"),
        ({"scope": LayerPlan({"9": 0.5})}, MaskMatchError, "the plan must cover every tensor"),
        ({"min_keep_per_layer": -1}, ValueError, "min_keep_per_layer must be at least 0, got -1"),
        ({"schedule": 0.9}, TypeError, "schedule must be a Schedule, got 0.9"),
        ({"schedule": Linear(0.5, t1=0.5, every=1)}, ValueError, "total_steps must be given"),
    ],
    ids=["pattern", "criterion", "enforce", "scope", "plan", "min-keep", "schedule", "fraction"],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Pruner(network(), **{"schedule": OneShot(0.5), **arguments})
