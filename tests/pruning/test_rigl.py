"""RigL: constant counts, and moves that an independent computation makes too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sapwood.pruning import (
    LayerPlan,
    MaskMatchError,
    MaskSet,
    RigL,
    erk_densities,
    prune,
)

from .toy import OPTIMIZERS, Restless, assert_masked, loss_of, network, train_step

STEPS, EVERY = 16, 3  # updates after 3, 6, 9 of the 12 steps before t_end


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def image_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 4, 4, generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(8) % 5).backward()
    optimizer.step()


class Witness:
    """Sees gradients before, and weights after a step, ahead of the pruner's own hooks."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.gradients: dict[str, np.ndarray[Any, Any]] = {}
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.double().numpy(force=True).copy()

    def after(self, *_: Any) -> None:
        for name, parameter in self.model.named_parameters():
            self.weights[name] = parameter.double().numpy(force=True).copy()


def moved(
    weight: np.ndarray[Any, Any],
    gradient: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    fraction: float,
) -> tuple[set[int], set[int]]:
    """Flat indices that are dropped and grown; equal values: the earlier one is the smaller."""
    active = np.flatnonzero(mask.ravel())
    inactive = np.flatnonzero(~mask.ravel())
    count = min(int(fraction * len(active)), len(inactive))
    by_weight = active[np.lexsort((active, np.abs(weight.ravel()[active])))]
    by_gradient = inactive[np.lexsort((inactive, np.abs(gradient.ravel()[inactive])))]
    return set(by_weight[:count].tolist()), set(by_gradient[len(inactive) - count :].tolist())


def flat(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", ["sgd", "sgd-nesterov-foreach", "adamw", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("build", [network, convolutional])
def test_drop_and_grow_are_those_of_numpy(build: Any, kind: str) -> None:
    model = build()
    train = train_step if build is network else image_step
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    witness = Witness(model, optimizer)
    pruner = RigL(model, 0.6, every=EVERY, total_steps=STEPS, alpha=0.5).attach(optimizer)
    start = pruner.masks
    counts, updates = start.counts(), 0
    for step in range(1, STEPS + 1):
        before = pruner.masks
        train(model, optimizer, step)
        assert pruner.masks.counts() == counts
        assert_masked(pruner, model, optimizer)
        if step % EVERY or step >= 0.75 * STEPS:
            assert pruner.masks == before
            continue
        updates += 1
        fraction = 0.5 / 2 * (1 + math.cos(math.pi * step / (0.75 * STEPS)))
        for name, mask in before.items():
            after = pruner.masks[name]
            dropped, grown = moved(
                witness.weights[name], witness.gradients[name], mask.numpy(), fraction
            )
            assert flat(mask & ~after) == dropped
            assert flat(after & ~mask) == grown
            assert not dropped & grown
            assert len(grown) == int(fraction * counts[name][0])
            assert_new(after & ~mask, model.get_parameter(name), optimizer)
    assert updates == 3
    assert pruner.finished
    assert pruner.masks != start


def assert_new(grown: Tensor, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """Grown weights are +0.0 bit for bit, without state."""
    assert bool(grown.any())
    assert int(parameter.detach()[grown].view(torch.int32).count_nonzero()) == 0
    for value in optimizer.state[parameter].values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            assert int(value[grown].count_nonzero()) == 0


def test_equal_weights_and_gradients_go_by_position() -> None:
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data.fill_(1.0)
    masks = MaskSet({"weight": torch.tensor([[True, True, True, True, False, False]])})
    pruner = RigL(layer, 2 / 6, init=masks, every=1, alpha=0.5, total_steps=40)
    layer.weight.grad = torch.ones(1, 6)
    assert pruner.step()
    # one of four drops, the first; of the two equal gradients the later one is the larger
    assert pruner.masks["weight"].tolist() == [[False, True, True, True, False, True]]


def test_what_is_dropped_does_not_grow_back_at_once() -> None:
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.tensor([[0.1, 3.0, 3.0, 3.0, 0.0, 0.0]])
    masks = MaskSet({"weight": torch.tensor([[True, True, True, True, False, False]])})
    pruner = RigL(layer, 2 / 6, init=masks, every=1, alpha=0.5, total_steps=40)
    layer.weight.grad = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.1, 0.2]])
    assert pruner.step()
    assert pruner.masks["weight"].tolist() == [[False, True, True, True, False, True]]


def test_a_dense_tensor_has_nothing_to_grow() -> None:
    model = network()
    masks = MaskSet({"0.weight": torch.ones(16, 8).bool(), "3.weight": torch.eye(3, 16).bool()})
    pruner = RigL(model, 45 / 176, init=masks, every=1, total_steps=4, alpha=1.0)
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        pruner.step()
        assert pruner.masks.counts() == {"0.weight": (128, 128), "3.weight": (3, 48)}
    assert pruner.masks["3.weight"].tolist() != masks["3.weight"].tolist()


def test_first_masks_have_the_planned_densities() -> None:
    sizes = {"0.weight": 128, "3.weight": 48}
    shapes = {"0.weight": (16, 8), "3.weight": (3, 16)}
    plan = LayerPlan({"0": 0.9, "3": 0.3})
    densities = {
        "erk": erk_densities(shapes, 0.7),
        "uniform": dict.fromkeys(sizes, 0.3),
        "plan": {n: 1 - s for n, s in plan.normalized(shapes, 0.7).items()},
    }
    for kind, expected in densities.items():
        init = plan if kind == "plan" else kind
        masks = RigL(network(), 0.7, init=init, total_steps=9).masks
        counts = masks.counts()
        assert sum(n - kept for kept, n in counts.values()) == round(0.7 * 176)
        for name, (kept, total) in counts.items():
            assert total == sizes[name]
            assert abs(kept - expected[name] * total) <= 1
    assert all(bool((~mask).any()) and bool(mask.any()) for mask in masks.values())


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    def run(seed: int, grow: str = "random") -> tuple[MaskSet, MaskSet]:
        model = network()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        torch.manual_seed(123)
        before = torch.get_rng_state()
        pruner = RigL(model, 0.7, grow=grow, every=2, total_steps=8, seed=seed).attach(optimizer)  # type: ignore[arg-type]
        first = pruner.masks
        for step in range(6):
            train_step(model, optimizer, step)
        assert torch.equal(torch.get_rng_state(), before)
        return first, pruner.masks

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]
    assert run(1)[0] == run(1, "gradient")[0]
    assert run(1)[1] != run(1, "gradient")[1]


def test_random_growth_takes_any_masked_weight() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = RigL(model, 0.5, grow="random", every=1, alpha=1.0, total_steps=60).attach(optimizer)
    grown = ~pruner.masks
    places = []
    for step in range(40):
        before = pruner.masks
        train_step(model, optimizer, step)
        assert pruner.masks.counts() == before.counts()
        new = pruner.masks & ~before
        assert_masked(pruner, model, optimizer)
        places.append(new)
        grown = grown & ~new
    assert grown.sparsity() == 1.0  # after 40 updates each place has had its turn
    assert all(a != b for a, b in itertools.pairwise(places) if a.sparsity() < 1.0)


def test_grown_weights_start_at_zero_whatever_the_optimizer_does() -> None:
    model = network()
    optimizer = Restless(model.parameters(), lr=0.1)
    optimizer.late = False
    pruner = RigL(model, 0.7, every=1, total_steps=12, alpha=0.9).attach(optimizer)
    for step in range(6):
        before = pruner.masks
        train_step(model, optimizer, step)
        for name, mask in before.items():
            assert_new(pruner.masks[name] & ~mask, model.get_parameter(name), optimizer)


def test_masks_of_another_method_start_it() -> None:
    model = network()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = RigL(model, 0.8, init=masks, every=1, total_steps=20).attach(optimizer)
    assert pruner.masks == masks
    for step in range(5):
        train_step(model, optimizer, step)
    assert pruner.masks != masks
    assert pruner.masks.counts() == masks.counts()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be finite and in \[0, 1\), got 1\.0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, r"every must be an integer, got 2\.0"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0\.0"),
        ({"alpha": "much"}, TypeError, "alpha must be a number, got 'much'"),
        ({"t_end": 1.5}, ValueError, r"t_end must be a fraction in \(0, 1\] or a step up to 9, "),
        ({"t_end": 10}, ValueError, "t_end must be a fraction .* got 10"),
        ({"grow": "all"}, ValueError, "grow must be 'gradient' or 'random', got 'all'"),
        ({"init": "snip"}, ValueError, r"init must be one of \('erk', 'uniform'\), a LayerPlan"),
        ({"init": LayerPlan({"9": 0.5})}, MaskMatchError, "the plan must cover every tensor"),
        (
            {"init": MaskSet({"3.weight": torch.ones(3, 16).bool()})},
            ValueError,
            r"init must switch off 24 of 48 elements at sparsity 0\.5, got masks that .* off 0",
        ),
        (
            {"init": MaskSet({"3.weight": torch.ones(3, 16).bool()}), "include": ["3.*"]},
            ValueError,
            "include must be None when masks are given",
        ),
        ({"exclude": ["9.*"]}, MaskMatchError, "got no match for '9"),
        ({"enforce": "never"}, ValueError, "enforce must be 'always' or 'on_update'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        RigL(network(), **{"sparsity": 0.5, "total_steps": 9, **arguments})


def test_a_cosine_of_updates() -> None:
    schedule = RigL(network(), 0.5, every=100, total_steps=1000, alpha=0.3).schedule
    assert [t for t in range(1001) if schedule.is_update(t)] == [100, 200, 300, 400, 500, 600, 700]
    assert schedule.last_update == 700
    assert schedule.fraction(0) == 0.3
    assert schedule.fraction(375) == pytest.approx(0.15)
    assert schedule.fraction(700) == pytest.approx(0.15 * (1 + math.cos(math.pi * 700 / 750)))
    late = RigL(network(), 0.5, every=100, total_steps=80).schedule
    assert late.last_update == 0
    exact = RigL(network(), 0.5, every=10, total_steps=50, t_end=30).schedule
    assert exact.last_update == 20  # the end itself is not an update
