"""Data parallelism on two processes: equal masks, equal to one process, and loud differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sapwood.pruning import (
    SNIP,
    Constant,
    Cubic,
    Linear,
    Magnitude,
    MaskSet,
    OneShot,
    Pruner,
    RigL,
    _distributed,
    prune,
    select,
)

from .ranks import Ranks, two_ranks

BATCH, EPOCHS, PER_EPOCH = 128, 4, 11


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    both = two_ranks()
    digits()
    both.run(warm_up)  # imports take longer than the tests, of which they are no part
    return both


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (rows, 64) in float64, whose sums hide no difference of order."""
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.from_numpy(x[order] / 16)
    classes = torch.from_numpy(y[order]).long()
    split = BATCH * PER_EPOCH
    return images[:split], classes[:split], images[split:], classes[split:]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)).double()


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)


def warm_up() -> None:
    digits()
    model = DistributedDataParallel(network())
    step_together(model, sgd(model))


def linear(model: nn.Module) -> Pruner:
    return Pruner(model, Linear(0.9, t1=33, every=5))


def cubic(model: nn.Module) -> Pruner:
    return Pruner(model, Cubic(0.9, t1=33, every=5), scope="layer")


def rigl(model: nn.Module) -> Pruner:
    return RigL(model, 0.9, every=5, total_steps=44)


def fit(model: nn.Module, pruner: Pruner, rank: int, size: int) -> tuple[list[str], float]:
    """Digest after each step and final accuracy, of training on this rank's rows of each batch."""
    x, y, x_test, y_test = digits()
    optimizer = sgd(model)
    pruner.attach(optimizer)
    seen = []
    for step in range(EPOCHS * PER_EPOCH):
        start = step % PER_EPOCH * BATCH
        rows = slice(start + rank * BATCH // size, start + (rank + 1) * BATCH // size)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        seen.append(pruner.masks.digest())
    assert pruner.masks.check(model) == []
    assert pruner.masks.sparsity() == 1 - 296 / 2960
    return seen, float((model(x_test).argmax(1) == y_test).double().mean())


def here() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def train_on_ranks(build: Callable[[nn.Module], Pruner]) -> tuple[list[str], float, list[Any]]:
    bare = network()
    model = DistributedDataParallel(bare)
    digests, accuracy = fit(model, build(model), *here())
    return digests, accuracy, [p.detach().numpy() for p in bare.parameters()]


@pytest.mark.parametrize("build", [linear, cubic, rigl])
def test_two_processes_train_as_one(ranks: Ranks, build: Callable[[nn.Module], Pruner]) -> None:
    model = network()
    digests, accuracy = fit(model, build(model), 0, 1)
    assert len(set(digests)) >= 6
    for theirs, their_accuracy, weights in ranks.run(train_on_ranks, build):
        assert theirs == digests
        assert abs(their_accuracy - accuracy) <= 0.003
        for mine, other in zip(model.parameters(), weights, strict=True):
            np.testing.assert_allclose(mine.detach().numpy(), other, rtol=1e-6, atol=1e-9)
    assert accuracy > 0.6  # 44 steps at 90 % from the start are few for RigL


def step_together(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 64, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def raises(error: type[Exception], action: Callable[[], Any]) -> str:
    """The message; the ranks can still talk to each other afterwards."""
    try:
        action()
    except error as caught:
        rank = torch.ones(1)
        torch.distributed.all_reduce(rank)
        assert rank.item() == 2
        return str(caught)
    raise AssertionError(f"{error.__name__} was expected")


def train_apart() -> str:
    model = DistributedDataParallel(network())
    if here()[0] == 1:
        model.module[2].weight.data[0] += 1.0  # type: ignore[index]
    optimizer = sgd(model)
    pruner = Pruner(model, OneShot(0.5, at=2)).attach(optimizer)
    step_together(model, optimizer)
    masks = pruner.masks
    message = raises(RuntimeError, lambda: step_together(model, optimizer))
    assert pruner.masks is masks
    return message


def test_ranks_that_differ_all_raise(ranks: Ranks) -> None:
    # global ranking: what the second tensor keeps more, the first one keeps less
    text = "sapwood.pruning.Pruner: masks must be the same on all ranks, got another 0.weight "
    for message in ranks.run(train_apart):
        assert message.startswith(text)


def attach_apart() -> list[str]:
    model = DistributedDataParallel(network())
    messages = []
    other = prune(network(), 0.5, scope="layer", inplace=False)
    if here()[0] == 1:
        flipped = {**other, "2.weight": ~other["2.weight"]}
        other = MaskSet(flipped)
    pruner = Pruner(model, Constant(0.5), masks=other)
    weights = [p.detach().clone() for p in model.parameters()]
    messages.append(raises(RuntimeError, lambda: pruner.attach(sgd(model))))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    if here()[0] == 1:
        other = MaskSet({"0.weight": other["0.weight"]})
    pruner = Pruner(model, Linear(0.9, t0=5, t1=9, every=2), masks=other)
    messages.append(raises(RuntimeError, lambda: pruner.attach(sgd(model))))
    return messages


def test_given_masks_are_compared_on_attach(ranks: Ranks) -> None:
    for rank, (bits, names) in enumerate(ranks.run(attach_apart)):
        assert bits.startswith("sapwood.pruning.Pruner: masks must be the same on all ranks, ")
        assert "got another 2.weight on this rank than on others of 2" in bits
        expected = "got another 2.weight" if rank == 0 else "got further masks on other ranks"
        assert names.startswith("sapwood.pruning.Pruner.attach: masks must be the same")
        assert expected in names


def choose_nothing() -> str:
    model = DistributedDataParallel(network())
    optimizer = sgd(model)
    Pruner(model, OneShot(0.5, at=1)).attach(optimizer)
    model(torch.ones(4, 64, dtype=torch.float64)).square().mean().backward()
    if here()[0] == 1:  # after the backward pass, whose gradients all ranks share
        model.module[0].weight.data[0, :3] = torch.nan  # type: ignore[index]
    return raises(RuntimeError if here()[0] == 0 else ValueError, optimizer.step)


def test_a_rank_that_cannot_choose_does_not_leave_the_others_waiting(ranks: Ranks) -> None:
    first, second = ranks.run(choose_nothing)
    assert first.endswith("on all ranks, got none on rank 1, where choosing failed")
    assert second.endswith("score 0.weight must hold numbers, got 3 NaN values")


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    x, y, _, _ = digits()
    return x[rank * 64 : (rank + 1) * 64], y[rank * 64 : (rank + 1) * 64]


def score_on_ranks() -> str:
    model = DistributedDataParallel(network())
    pruner = Pruner(model, OneShot(0.9), SNIP())
    pruner.step(batch_of(here()[0]))
    return pruner.masks.digest()


def test_scores_from_data_are_averaged(ranks: Ranks) -> None:
    dense = MaskSet.dense(network())
    each = [SNIP().scores(network(), dense, batch_of(rank)) for rank in range(2)]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in dense}
    expected = select(mean, dense, 0.9)
    assert ranks.run(score_on_ranks) == [expected.digest()] * 2
    assert all(select(one, dense, 0.9) != expected for one in each)


class Fragile(Magnitude):
    """Needs data, and fails where there are none."""

    @property
    def needs_data(self) -> bool:
        return True

    def scores(
        self, model: nn.Module, masks: MaskSet, batch: Any = None, loss_fn: Any = None
    ) -> dict[str, Tensor]:
        if batch is None:
            raise ValueError("no data")
        return super().scores(model, masks)


def score_on_one_rank() -> str:
    model = DistributedDataParallel(network())
    pruner = Pruner(model, OneShot(0.9), Fragile())
    if here()[0] == 0:
        return raises(RuntimeError, lambda: pruner.step("data"))
    return raises(ValueError, pruner.step)


def test_scores_that_a_rank_lacks(ranks: Ranks) -> None:
    first, second = ranks.run(score_on_one_rank)
    assert first == "sapwood.pruning.Pruner: every rank must have scores, got none on rank 1"
    assert second == "no data"


def without_wrapper() -> None:
    """Ranks with a bare model go their own ways: nothing is exchanged, and nobody waits."""
    if here()[0] == 1:
        model = network()
        optimizer = sgd(model)
        pruner = Pruner(model, Linear(0.5, t1=2, every=1)).attach(optimizer)
        for _ in range(3):
            step_together(model, optimizer)
        pruner.report()
        assert pruner.masks.check(model) == []


def test_a_bare_model_exchanges_nothing(ranks: Ranks) -> None:
    ranks.run(without_wrapper)


@pytest.mark.parametrize(
    ("config", "near", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:1", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda"),
    ],
)
def test_messages_travel_where_the_backend_takes_them(
    config: str, near: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: config)
    group: Any = object()
    assert _distributed.wire(group, torch.device(near)) == torch.device(device)


def with_group() -> str:
    model = network()
    group = torch.distributed.group.WORLD
    pruner = Pruner(model, OneShot(0.5), process_group=group)
    pruner.step()
    torch.manual_seed(here()[0])
    nn.init.normal_(model[0].weight)
    pruner = Pruner(model, OneShot(0.5), process_group=group)
    return raises(RuntimeError, pruner.step)


def test_a_given_group_is_used_for_a_bare_model(ranks: Ranks) -> None:
    for message in ranks.run(with_group):
        assert "got another 0.weight" in message


def compiled_wrapper() -> bool:
    model = torch.compile(DistributedDataParallel(network()), backend="eager")
    optimizer = sgd(model)
    pruner = Pruner(model, OneShot(0.5, at=1)).attach(optimizer)
    if here()[0] == 1:
        next(iter(model.parameters())).data.neg_().add_(0.5)
    message = raises(RuntimeError, lambda: step_together(model, optimizer))
    return "got another 0.weight" in message and list(pruner.masks) == ["0.weight", "2.weight"]


def test_the_group_is_found_inside_a_compiled_model(ranks: Ranks) -> None:
    assert ranks.run(compiled_wrapper) == [True, True]
