"""Criteria that need data leave the model as it was, say what is wrong, and work in prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sapwood.pruning import (
    SNIP,
    Criterion,
    GradientMagnitude,
    GraSP,
    MaskMatchError,
    MaskSet,
    OneShot,
    Pruner,
    Taylor,
    prune,
)
from sapwood.pruning.criteria import describe_criterion, resolve_criterion

RULES: dict[str, Criterion] = {
    "snip": SNIP(),
    "gradient": GradientMagnitude(),
    "taylor": Taylor(),
    "grasp": GraSP(samples_per_class=None),
    "grasp-reinit": GraSP(samples_per_class=2, reinit=True),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


class Noise(nn.Module):
    """Draws random numbers and counts its calls in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 1e-3 * torch.randn(x.shape)


def network() -> nn.Sequential:
    """Modes, gradients and requires_grad are mixed; BatchNorm has seen data."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        Noise(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
    )
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    net[0].weight.grad = None
    net[6].weight.requires_grad_(False)
    net[1].eval()
    net[4].eval()
    return net


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.arange(16) % 4


def snapshot(net: nn.Module) -> Callable[[], None]:
    """Returns a check that nothing differs, object by object and bit by bit."""
    modes = {name: module.training for name, module in net.named_modules()}
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    storage = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    grads = {
        name: (tensor.grad, None if tensor.grad is None else tensor.grad.clone())
        for name, tensor in tensors.items()
    }
    state = torch.random.get_rng_state()

    def check() -> None:
        assert {name: module.training for name, module in net.named_modules()} == modes
        now = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        assert list(now) == list(tensors)
        for name, tensor in now.items():
            assert tensor is tensors[name], name
            assert tensor._version == versions[name], name
            assert tensor.data_ptr() == storage[name], name
            assert torch.equal(tensor, values[name]), name
            assert tensor.requires_grad == flags[name], name
            grad, value = grads[name]
            assert tensor.grad is grad, name
            assert grad is None or torch.equal(grad, value), name
        assert torch.equal(torch.random.get_rng_state(), state)

    return check


@every_rule
def test_nothing_of_the_model_changes(rule: Criterion) -> None:
    net = network()
    unchanged = snapshot(net)
    found = rule.scores(net, MaskSet.dense(net), batch())
    unchanged()
    assert all(bool(score.isfinite().all()) and bool(score.any()) for score in found.values())
    loader = DataLoader(TensorDataset(*batch()), batch_size=8, shuffle=True)
    rule.scores(net, MaskSet.dense(net), loader)
    unchanged()


@every_rule
@pytest.mark.parametrize("fails", ["loss", "forward", "data"])
def test_nothing_of_the_model_changes_when_scoring_fails(rule: Criterion, fails: str) -> None:
    net = network()
    calls = 0

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if fails == "loss" and calls == 2:
            raise KeyboardInterrupt
        return F.cross_entropy(output, y)

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch()
        if fails == "data":
            raise KeyboardInterrupt
        yield batch()

    if fails == "forward":
        net[7].register_forward_hook(_interrupt)
    unchanged = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        rule.scores(net, MaskSet.dense(net), data(), loss_fn)
    unchanged()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _refuse(*_: Any) -> None:
    raise AssertionError("must not be called")


@every_rule
def test_the_mode_of_scoring(rule: Criterion) -> None:
    """Only BatchNorm is in training mode, whatever the model's own ``train`` would do."""

    class Model(nn.Sequential):
        def train(self, mode: bool = True) -> Model:
            raise AssertionError("must not be called")

    net = Model(*network())
    seen: list[set[str]] = []
    net.register_forward_hook(
        lambda *_: seen.append({name for name, m in net.named_modules() if m.training})
    )
    rule.scores(net, MaskSet.dense(net), batch())
    assert seen
    assert all(names == {"1", "7"} for names in seen)


def test_reinit_scores_a_network_with_xavier_weights() -> None:
    net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 4))
    masks = prune(net, 0.5)
    data = torch.randn(24, 40), torch.arange(24) % 4
    drawn: list[Tensor] = []
    hook = net.register_forward_hook(
        lambda *_: drawn.extend(net[i].weight.detach().clone() for i in (0, 2))
    )
    rule = GraSP(1.0, samples_per_class=None, reinit=True, seed=3)
    found = rule.scores(net, masks, data)
    hook.remove()
    assert masks.check(net) == []
    kept = masks["0.weight"]
    assert not drawn[0][~kept].any()
    assert abs(float(drawn[0][kept].std()) / math.sqrt(2 / (40 + 60)) - 1.0) < 0.1
    assert not torch.equal(drawn[0], net[0].weight)

    other = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 4))
    other.load_state_dict({**net.state_dict(), "0.weight": drawn[0], "2.weight": drawn[1]})
    expected = GraSP(1.0, samples_per_class=None).scores(other, masks, data)
    again = rule.scores(net, masks, data)
    reseeded = GraSP(1.0, samples_per_class=None, reinit=True, seed=4).scores(net, masks, data)
    for name in masks:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], reseeded[name])


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_rule
def test_a_distributed_model_trains_on_afterwards(rule: Criterion, one_process: None) -> None:
    """Its forward, which communicates, is not called: one process may score alone."""
    net = network()
    expected = rule.scores(net, MaskSet.dense(net), batch())
    parallel = nn.parallel.DistributedDataParallel(net)
    unchanged = snapshot(net)
    hook = parallel.register_forward_pre_hook(_refuse)
    found = rule.scores(parallel, MaskSet.dense(parallel), batch())
    hook.remove()
    unchanged()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for _ in range(2):
        F.cross_entropy(parallel(batch()[0]), batch()[1]).backward()


def test_sharded_parameters_are_refused(one_process: None) -> None:
    net = nn.Linear(4, 2)
    masks = MaskSet.dense(net)
    sharded = fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        NotImplementedError,
        match=r"SNIP\.scores: weight must be an ordinary tensor, got a sharded DTensor; score",
    ):
        SNIP().scores(sharded, masks, (torch.randn(2, 4), torch.tensor([0, 1])))


@pytest.mark.parametrize("name", ["snip", "grasp", "gradient", "taylor"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_by_name(name: str, scope: str) -> None:
    net = network()
    data = tuple(torch.cat([part] * 3) for part in batch())
    expected = resolve_criterion(name, "here").scores(net, MaskSet.dense(net), data)
    masks = prune(net, 0.9, name, scope=scope, batch=data)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(kept for kept, _ in masks.counts().values()) == total - round(0.9 * total)
    assert masks.check(net) == []
    for key, mask in masks.items():
        assert float(expected[key][mask].min()) >= float(expected[key][~mask].max())
    with pytest.raises(ValueError, match="prune: batch must be given for"):
        prune(net, 0.9, name)


@pytest.mark.parametrize(
    "rule",
    [
        SNIP(),
        GradientMagnitude(),
        Taylor(),
        GraSP(),
        GraSP(temperature=2.0, samples_per_class=None, reinit=True, seed=5),
    ],
    ids=repr,
)
def test_a_saved_pruner_remembers_the_criterion(rule: Criterion, tmp_path: Path) -> None:
    net = network()
    pruner = Pruner(net, OneShot(0.5, at=1), rule)
    pruner.step(tuple(torch.cat([part] * 3) for part in batch()))
    assert pruner.masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    pruner.save(tmp_path / "pruner.safetensors")
    loaded = Pruner.load(tmp_path / "pruner.safetensors", net)
    assert loaded.criterion == rule
    assert type(loaded.criterion) is type(rule)
    assert loaded.masks == pruner.masks
    described = describe_criterion(rule)
    assert described is not None
    assert resolve_criterion(described["name"], "here", **described["parameters"]) == rule
    assert isinstance(rule, Criterion)
    assert rule.needs_data


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


@every_rule
@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (None, ValueError, r"batch must be given, got None"),
        (X, TypeError, r"batch must be a pair \(X, y\) of tensors or an iterable of pairs, got Te"),
        (3, TypeError, r"batch must be a pair \(X, y\) of tensors or an iterable of pairs, got in"),
        ([(X, Y), X], TypeError, r"batch must hold pairs \(X, y\) of tensors, got Tensor"),
        ([{"x": X}], TypeError, r"batch must hold pairs \(X, y\) of tensors, got dict"),
        ([(X, Y, Y)], TypeError, r"batch must hold pairs \(X, y\) of tensors, got tuple"),
        ([], ValueError, r"batch must hold at least one pair, got none"),
        ((X, Y[:3]), ValueError, r"y must have as many rows as X, 4, got 3"),
        ((X[:0], Y[:0]), ValueError, r"X must have at least one row, got shape \(0, 3\)"),
        ((X[0, 0], Y[0]), ValueError, r"X must have at least one row, got shape \(\)"),
    ],
)
def test_bad_batches(rule: Criterion, data: Any, error: type[Exception], text: str) -> None:
    layer = nn.Linear(3, 2)
    where = rf"sapwood\.pruning\.{type(rule).__name__}\.scores: "
    with pytest.raises(error, match=where + text):
        rule.scores(layer, MaskSet.dense(layer), data)


@every_rule
def test_bad_losses_models_and_masks(rule: Criterion) -> None:
    layer = nn.Linear(3, 2)
    masks = MaskSet.dense(layer)
    with pytest.raises(TypeError, match=r"scores: loss_fn must return a tensor, got float"):
        rule.scores(layer, masks, (X, Y), lambda output, y: 1.0)
    with pytest.raises(
        ValueError, match=r"scores: loss_fn must return a scalar, got shape \(\d, 2\)"
    ):
        rule.scores(layer, masks, (X, Y), lambda output, y: output)
    with pytest.raises(MaskMatchError, match=r"scores: every mask must belong to a parameter"):
        rule.scores(layer, MaskSet({"other": torch.ones(2, 3).bool()}), (X, Y))
    with pytest.raises(
        ValueError, match=r"scores: weight must have the parameter's shape \(2, 3\)"
    ):
        rule.scores(layer, MaskSet({"weight": torch.ones(3, 2).bool()}), (X, Y))
    lazy = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2))
    only = MaskSet.dense(lazy, ["0.weight"])
    with pytest.raises(
        ValueError, match=r"scores: 1\.weight must be initialised \(run one forward"
    ):
        rule.scores(lazy, only, (X, Y))
    assert rule.scores(layer, MaskSet({}), (X, Y)) == {}


@every_rule
def test_non_finite_losses_are_refused_and_nan_scores_reach_select(rule: Criterion) -> None:
    net, (x, y) = network(), batch()
    before = [p.detach().clone() for p in net.parameters()]
    for value, text in ((math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(ValueError, match=rf"scores: loss must be finite, got {text}"):
            rule.scores(net, MaskSet.dense(net), (x, y), lambda o, t, v=value: o.sum() * 0 + v)

    def nan_gradient(output: Tensor, y: Tensor) -> Tensor:
        return (output - output.detach()).sum().abs().sqrt() * 0.0

    with pytest.raises(ValueError, match=r"score 0\.weight must hold numbers, got 36 NaN values"):
        prune(net, 0.5, rule, batch=(x, y), loss_fn=nan_gradient)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_bad_parameters_of_grasp() -> None:
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="GraSP: temperature must be finite and positive, got"):
            GraSP(temperature=temperature)
    for count in (0, True, 2.0):
        with pytest.raises(
            ValueError, match="GraSP: samples_per_class must be an integer of at le"
        ):
            GraSP(samples_per_class=count)  # type: ignore[arg-type]

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    layer = Two(3, 2)
    with pytest.raises(
        TypeError, match=r"GraSP\.scores: the model must return a tensor, got tuple"
    ):
        GraSP(samples_per_class=2).scores(layer, MaskSet.dense(layer), (X, Y))
