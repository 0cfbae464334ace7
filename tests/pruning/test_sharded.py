"""fully_shard on two processes: the masks of one process, bit for bit, on uneven shards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood.pruning import (
    Constant,
    Cubic,
    LayerPlan,
    Linear,
    MaskSet,
    OneShot,
    Pruner,
    RigL,
    prune,
)
from sapwood.pruning._distributed import full, is_sharded, local, place

from .ranks import Ranks, two_ranks

STEPS, T1 = 8, 6


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    both = two_ranks()
    both.run(warm_up)  # imports take longer than the tests, of which they are no part
    return both


def network(seed: int = 0) -> nn.Sequential:
    """Shards of 3 and 2, of 4 and 3, of 1 and 0, and of equal rows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 1),
        nn.Linear(1, 4),
    )  # fmt: skip


def sharded(seed: int = 0, mesh_shape: tuple[int, ...] = (2,)) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(seed)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def warm_up() -> None:
    model = sharded()
    give_gradients(network(), model, 0)
    make_optimizer("sgd", model).step()


def make_optimizer(kind: str, model: nn.Module) -> Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def make_pruner(kind: str, model: nn.Module) -> Pruner:
    if kind == "linear":
        return Pruner(model, Linear(0.7, t1=T1, every=2))
    if kind == "cubic":
        return Pruner(model, Cubic(0.7, t1=T1, every=2), scope="layer")
    if kind == "random":
        return Pruner(model, Linear(0.7, t1=T1, every=1), "random", scope="erk", seed=3)
    if kind == "plan":
        plan = LayerPlan({"0": 0.2, "2": 0.8, "4": 0.5, "5": 0.1})
        return Pruner(model, Linear(0.6, t1=T1, every=3), scope=plan)
    if kind == "rows":
        return Pruner(model, Linear(0.6, t1=T1, every=2), granularity="row")
    if kind == "on_update":
        return Pruner(model, Linear(0.7, t1=T1, every=2), enforce="on_update")
    if kind == "rigl-random":
        return RigL(model, 0.6, every=2, total_steps=STEPS, grow="random", alpha=0.9, seed=5)
    return RigL(model, 0.6, every=2, total_steps=STEPS, alpha=0.9, seed=5)


def give_gradients(alone: nn.Module, apart: nn.Module, step: int) -> None:
    """The same gradients for both models, with ties among them."""
    generator = torch.Generator().manual_seed(step)
    theirs = dict(apart.named_parameters())
    for name, parameter in alone.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator).mul_(8).round_().div_(8)
        parameter.grad = gradient
        theirs[name].grad = place(gradient, theirs[name])


def assert_same_weights(alone: nn.Module, apart: nn.Module) -> None:
    theirs = dict(apart.named_parameters())
    for name, parameter in alone.named_parameters():
        assert is_sharded(theirs[name])
        assert torch.equal(parameter.detach(), theirs[name].detach().full_tensor()), name


def compare(kind: str, optimizer_kind: str) -> list[str]:
    """Trains whole and sharded from the same weights and gradients; digests after each step."""
    alone, apart = network(), sharded()
    optimizers = make_optimizer(optimizer_kind, alone), make_optimizer(optimizer_kind, apart)
    one, many = make_pruner(kind, alone), make_pruner(kind, apart)
    one.attach(optimizers[0])
    many.attach(optimizers[1])
    digests = []
    for step in range(STEPS):
        give_gradients(alone, apart, step)
        for optimizer in optimizers:
            optimizer.step()
        assert all(is_sharded(mask) for mask in many.masks.values())
        assert many.masks.full() == one.masks
        assert many.masks.digest() == one.masks.digest()
        assert many.masks.counts() == one.masks.counts()
        assert many.masks.sparsity() == one.masks.sparsity()
        assert many.masks.check(apart) == []
        assert_same_weights(alone, apart)
        digests.append(many.masks.digest())
    assert many.finished
    for name, parameter in apart.named_parameters():
        for key, value in optimizers[1].state[parameter].items():
            if value.shape == parameter.shape:
                mine = optimizers[0].state[alone.get_parameter(name)][key]
                assert torch.equal(value.full_tensor(), mine), f"{name} {key}"
    assert many.report().to_json() == one.report().to_json()
    assert many.report().state_elements > 0
    return digests


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("linear", "sgd"),
        ("linear", "adamw"),
        ("cubic", "adamw"),
        ("random", "sgd"),
        ("plan", "adamw"),
        ("rows", "sgd"),
        ("on_update", "adamw"),
        ("rigl", "adamw"),
        ("rigl", "sgd"),
        ("rigl-random", "sgd"),
    ],
)
def test_masks_are_those_of_one_process(ranks: Ranks, kind: str, optimizer: str) -> None:
    first, second = ranks.run(compare, kind, optimizer)
    assert first == second
    assert len(set(first)) >= 3


def train_for_real() -> list[Any]:
    """Forward and backward under fully_shard, each rank with its half of the batch."""
    rank = torch.distributed.get_rank()
    results = []
    for model, rows in ((network(), slice(0, 8)), (sharded(), slice(4 * rank, 4 * rank + 4))):
        optimizer = make_optimizer("sgd", model)
        pruner = Pruner(model, Linear(0.5, t1=4, every=1)).attach(optimizer)
        for step in range(6):
            x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x[rows]).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model(x[:1])  # leaves gathered copies where the shards were
            assert pruner.masks.check(model) == []
        assert pruner.report().sparsity_by_weight == pruner.masks.sparsity() == 1 - 121 / 241
        results.append([full_weight(p).numpy() for p in model.parameters()])
    return results


def full_weight(parameter: Tensor) -> Tensor:
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()


def test_training_agrees_with_one_process(ranks: Ranks) -> None:
    for alone, apart in ranks.run(train_for_real):
        for a, b in zip(alone, apart, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


def save_on_ranks(folder: Path) -> list[str]:
    model = sharded()
    optimizer = make_optimizer("adamw", model)
    pruner = make_pruner("cubic", model).attach(optimizer)
    for step in range(3):
        give_gradients(network(), model, step)
        optimizer.step()
    pruner.save(folder / "pruner")
    pruner.masks.save(folder / "masks", metadata={"run": "7"})
    assert (folder / "pruner").exists()
    assert (folder / "masks").exists()
    state = pruner.state_dict()
    assert is_sharded(state["mask/0.weight"])  # type: ignore[arg-type]

    again = sharded()
    loaded = Pruner.load(folder / "pruner", again)
    assert all(is_sharded(mask) for mask in loaded.masks.values())
    assert loaded.masks == pruner.masks
    third = make_pruner("cubic", sharded())
    third.load_state_dict(state)
    assert third.masks == loaded.masks
    assert third.step_count == 3
    whole = MaskSet.load(folder / "masks")
    assert whole == pruner.masks
    assert pruner.masks == whole
    assert whole.check(again) != []
    whole.apply_(again)
    assert whole.check(again) == pruner.masks.check(again) == []
    plain = network()
    pruner.masks.apply_(plain)
    assert whole.check(plain) == []
    with pytest.raises(OSError, match="missing") if writes() else pytest.raises(RuntimeError):
        pruner.save(folder / "missing" / "pruner")
    return [pruner.masks.digest(), again[2].weight.full_tensor().count_nonzero().item()]


def writes() -> bool:
    return torch.distributed.get_rank() == 0


def test_files_hold_whole_masks(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(save_on_ranks, tmp_path)
    assert first == second
    masks = MaskSet.load(tmp_path / "masks")
    assert masks.digest() == first[0]
    assert masks.metadata == {"run": "7"}
    model = network()
    pruner = Pruner.load(tmp_path / "pruner", model)
    assert pruner.masks == masks
    assert pruner.step_count == 3
    optimizer = make_optimizer("sgd", model)
    pruner.attach(optimizer)
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    assert pruner.masks.check(model) == []


def shard_later() -> None:
    """A pruner that was made before its model was sharded follows."""
    from torch.distributed.fsdp import fully_shard

    alone, apart = network(), network()
    masks = prune(network(seed=1), 0.5, inplace=False)
    one = Pruner(alone, Linear(0.8, t1=4, every=2), masks=masks)
    many = Pruner(apart, Linear(0.8, t1=4, every=2), masks=masks)
    fully_shard(apart)
    for _ in range(4):
        one.step()
        many.step()
        assert many.masks.full() == one.masks
        assert_same_weights(alone, apart)
    assert is_sharded(many.masks["0.weight"])


def test_sharding_after_the_pruner_is_made(ranks: Ranks) -> None:
    ranks.run(shard_later)


def mask_algebra() -> None:
    model = sharded()
    a = prune(model, 0.5, "random", inplace=False)
    b = prune(model, 0.5, inplace=False)
    whole_a, whole_b = a.full(), b.full()
    assert not any(is_sharded(mask) for mask in whole_a.values())
    for sharded_result, whole in (
        (a & b, whole_a & whole_b),
        (a | b, whole_a | whole_b),
        (a ^ b, whole_a ^ whole_b),
        (~a, ~whole_a),
        (a & whole_b, whole_a & whole_b),
        (whole_a & b, whole_a & whole_b),
    ):
        assert sharded_result == whole
        assert sharded_result.digest() == whole.digest()
    assert a.overlap(b) == whole_a.overlap(whole_b)
    assert (a == b, a == whole_a, whole_a == a, a == whole_b) == (False, True, True, False)
    # one differing element, on one rank only
    c = MaskSet({name: copy.copy(mask) for name, mask in whole_a.items()})
    last = c["2.weight"].clone()
    last[6, 19] = ~last[6, 19]
    assert a != MaskSet({**c, "2.weight": last})
    assert repr(a) == "MaskSet(4 tensors, 241 elements, sharded)"
    assert a.to("cpu") == a
    with pytest.raises(NotImplementedError, match=r"to: device must be that of the sharded mask 0"):
        a.to("meta")
    zeroed = MaskSet.from_zeros(model)
    assert zeroed.counts() == MaskSet.dense(model).counts()
    local(model[2].weight).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"2\.weight must hold numbers, got 140 NaN values"):
        MaskSet.from_zeros(model)


def test_sets_of_sharded_masks(ranks: Ranks) -> None:
    ranks.run(mask_algebra)


def placements() -> None:
    """Whole -> part -> whole, for every way to split a tensor over two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    flat = init_device_mesh("cpu", (2,))
    mesh = init_device_mesh("cpu", (2, 1))
    whole = torch.rand(5, 8, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    for where, how in (
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (flat, [Shard(2)]),
        (flat, [Replicate()]),
        (mesh, [Shard(0), Shard(0)]),
        (mesh, [Shard(1), Replicate()]),
        (mesh, [Replicate(), Shard(0)]),
        (flat, [_StridedShard(1, split_factor=2)]),
    ):
        like = distribute_tensor(torch.zeros(5, 8, 3), where, how, src_data_rank=None)
        mask = place(whole, like)
        assert is_sharded(mask)
        part = distribute_tensor(whole, where, how, src_data_rank=None)
        assert torch.equal(local(mask), local(part))
        assert torch.equal(full(mask), whole), how
        assert place(mask, like) is mask
        other = place(mask, distribute_tensor(torch.zeros(5, 8, 3), flat, [Shard(1)]))
        assert torch.equal(full(other), whole)
        masks = MaskSet({"w": mask})
        assert masks.counts() == {"w": (int(whole.sum()), 120)}
        assert masks.digest() == MaskSet({"w": whole}).digest()


def test_every_placement_keeps_every_bit(ranks: Ranks) -> None:
    ranks.run(placements)


def replicated_shards() -> str:
    """Hybrid sharding: two replicas of one shard each; they must agree."""
    model = sharded(mesh_shape=(2, 1))
    optimizer = make_optimizer("sgd", model)
    pruner = Pruner(model, OneShot(0.5, at=2)).attach(optimizer)
    give_gradients(network(), model, 0)
    optimizer.step()
    if torch.distributed.get_rank() == 1:
        local(model[2].weight).mul_(100)
    masks = pruner.masks
    with pytest.raises(RuntimeError, match="must be the same on all ranks") as caught:
        optimizer.step()
    assert pruner.masks is masks
    return str(caught.value)


def test_replicas_of_shards_are_compared(ranks: Ranks) -> None:
    for message in ranks.run(replicated_shards):
        assert "got another 0.weight on this rank" in message


def ignored_parameters() -> None:
    """Plain parameters beside sharded ones are compared over the whole mesh."""
    from torch.distributed.fsdp import fully_shard

    alone, model = network(), network()
    fully_shard(model, ignored_params={model[2].weight})
    pruner, one = (Pruner(m, Constant(0.5), scope="layer") for m in (model, alone))
    for each in (pruner, one):
        each.step()
    assert is_sharded(pruner.masks["0.weight"])
    assert not is_sharded(pruner.masks["2.weight"])
    assert pruner.masks.full() == one.masks
    if torch.distributed.get_rank() == 1:
        model[2].weight.data.copy_(torch.arange(140.0).view(7, 20))
    again = Pruner(model, OneShot(0.7), scope="layer")
    with pytest.raises(RuntimeError, match=r"got another 2\.weight on this rank"):
        again.step()


def test_plain_parameters_beside_sharded_ones(ranks: Ranks) -> None:
    ranks.run(ignored_parameters)


def test_the_older_wrapper_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Wrapped(FullyShardedDataParallel):
        def __init__(self) -> None:  # without the process group that the real one asks for
            nn.Module.__init__(self)

    for action in (MaskSet.dense, lambda m: Pruner(m, OneShot(0.5)), lambda m: prune(m, 0.5)):
        with pytest.raises(NotImplementedError, match=r"torch\.distributed\.fsdp\.fully_shard"):
            action(Wrapped())
