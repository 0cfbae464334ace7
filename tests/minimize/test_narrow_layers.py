"""Layers that read or write few channels of a wide stream compute those alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import (
    InputSelect,
    OutputScatter,
    load,
    minimize,
    remap_optimizer,
    save,
)
from tests.minimize.planting import Net, dead, kept, minimized, prepared, random, refusals, unread

WIDTH = 16


def stream(branch: nn.Module, stem: nn.Module, head: nn.Module) -> Net:
    """A residual block between two layers."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(y + m.branch(y))

    return prepared(Net(forward, stem=stem, branch=branch, head=head))  # type: ignore[return-value]


def linear_stream() -> Net:
    branch = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH))
    return stream(branch, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3))


def writing(model: Net, *rows: int) -> Net:
    """The branch writes the given channels alone; what it adds to the others is its bias."""
    last = model.branch[2]
    for row in set(range(WIDTH)) - set(rows):
        dead(last, row)
    return model


def test_a_branch_that_writes_few_channels() -> None:
    model = writing(linear_stream(), 3, 9)
    small, report = minimized(model, random(5, 4))
    layer, scatter = small.branch[2]
    assert layer.weight.shape == (2, 24)
    assert layer.bias is None
    assert isinstance(scatter, OutputScatter)
    assert scatter.index.tolist() == [3, 9]
    torch.testing.assert_close(scatter.bias, model.branch[2].bias)
    assert report.parameters_before - report.parameters_after == 14 * 24 - 2
    assert minimize(small, random(5, 4))[1].plan.edits == []


def test_a_later_pass_follows_what_died_since() -> None:
    small, _ = minimized(writing(linear_stream(), 3, 9, 12), random(5, 4))
    dead(small.branch[2][0], 1)
    unread(small.head, 5)
    unread(small.branch[0], 5)
    unread(small.head, 3)
    unread(small.branch[0], 3)  # the first channel that the branch writes
    smaller, report = minimized(small, random(5, 4))
    assert kept(report, "stem") == [c for c in range(WIDTH) if c not in (3, 5)]
    assert smaller.branch[2][0].weight.shape == (1, 24)
    assert smaller.branch[2][1].index.tolist() == [10]
    assert report.param_map["branch.2.1.bias"].index == (tuple(kept(report, "stem")),)


def test_a_branch_that_became_a_constant_is_its_bias() -> None:
    small, report = minimized(writing(linear_stream()), random(5, 4))
    layer, scatter = small.branch[2]
    assert layer.weight.shape == (1, 1)
    assert scatter.width == WIDTH
    assert minimize(small, random(5, 4))[1].plan.edits == []
    assert report.macs_after < report.macs_before / 2


def test_both_ends_of_one_layer(tmp_path: Path) -> None:
    def make() -> Net:
        return stream(nn.Linear(WIDTH, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3))

    model = make()
    for channel in range(3, WIDTH):
        dead(model.branch, channel)
        unread(model.branch, channel)
    small, report = minimized(model, random(5, 4))
    select, layer, scatter = small.branch
    assert isinstance(select, InputSelect)
    assert layer.weight.shape == (3, 3)
    assert isinstance(scatter, OutputScatter)
    assert report.param_map["branch.weight"].name == "branch.1.weight"
    assert report.param_map["branch.bias"].name == "branch.2.bias"
    save(small, tmp_path / "small.safetensors", report=report)
    again = load(tmp_path / "small.safetensors", make)
    assert torch.equal(again(random(5, 4)), small(random(5, 4)))
    assert minimize(small, random(5, 4))[1].plan.edits == []


@pytest.mark.parametrize("padding", [0, 1], ids=["valid", "zeros"])
def test_convolutions(padding: int, tmp_path: Path) -> None:
    def make() -> Net:
        branch = nn.Sequential(
            nn.Conv2d(WIDTH, 8, 3, padding=padding),
            nn.ReLU(),
            nn.ConstantPad2d(1 - padding, 0.5),
            nn.Conv2d(8, WIDTH, 1),
        )
        return stream(branch, nn.Conv2d(2, WIDTH, 1), nn.Conv2d(WIDTH, 3, 1))

    model = make()
    for channel in range(2, WIDTH):
        unread(model.branch[0], channel)
        dead(model.branch[3], channel)
    small, report = minimized(model, random(2, 2, 6, 5))
    select, first = small.branch[0]
    assert select.index.tolist() == [0, 1]
    assert first.weight.shape == (8, 2, 3, 3)
    last, scatter = small.branch[3]
    assert last.weight.shape == (2, 8, 1, 1)
    assert (scatter.dim, scatter.width) == (-3, WIDTH)
    assert report.macs_after < report.macs_before / 2
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", make)
    assert torch.equal(again(random(2, 2, 6, 5)), small(random(2, 2, 6, 5)))


def test_constants_that_stay_in_the_stream_fold_where_they_are_not_read() -> None:
    """A layer that reads two live channels and constants folds these and selects the others."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return torch.softmax(y, -1) + m.branch(y)

    layers = {"stem": nn.Linear(4, WIDTH), "branch": nn.Linear(WIDTH, WIDTH)}
    model = prepared(Net(forward, **layers))
    for channel in range(2, WIDTH):
        dead(model.stem, channel, bias=0.1 * channel)
    small, _ = minimized(model, random(5, 4))
    select, layer = small.branch
    assert select.index.tolist() == [0, 1]
    assert layer.weight.shape == (WIDTH, 2)


def test_half_of_the_channels_are_too_many() -> None:
    small, _ = minimized(writing(linear_stream(), *range(8)), random(5, 4))
    assert type(small.branch[2]) is nn.Linear


def test_a_weight_that_is_used_without_its_module_stays() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(y + F.linear(y, m.branch.weight, m.branch.bias))

    layers = {"stem": nn.Linear(4, WIDTH), "branch": nn.Linear(WIDTH, WIDTH)}
    model = prepared(Net(forward, **layers, head=nn.Linear(WIDTH, 3)))
    for channel in range(2, WIDTH):
        dead(model.branch, channel)
        unread(model.branch, channel)
    small, _ = minimized(model, random(5, 4))
    assert type(small.branch) is nn.Linear


def test_code_that_looks_at_its_layers_keeps_them() -> None:
    """As T5 asks for the dtype of a layer's weight: the others are narrowed all the same."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        z = torch.relu(m.up(y)).to(m.down.weight.dtype)
        return m.head(y + m.down(z) + m.other(y))

    layers = {"stem": nn.Linear(4, WIDTH), "up": nn.Linear(WIDTH, 20)}
    layers |= {"down": nn.Linear(20, WIDTH), "other": nn.Linear(WIDTH, WIDTH)}
    model = prepared(Net(forward, **layers, head=nn.Linear(WIDTH, 3)))
    for channel in range(2, WIDTH):
        dead(model.down, channel)
        dead(model.other, channel)
    unread(model.down, 4)
    small, report = minimized(model, random(5, 4))
    assert type(small.down) is nn.Linear
    assert small.up.out_features == 19
    assert isinstance(small.other[1], OutputScatter)
    expected = "down: left alone: not narrowed: the model's code does not follow"
    assert expected in refusals(report)
    assert "other" not in refusals(report)


def test_a_hook_sees_the_channels_that_it_saw() -> None:
    model = writing(linear_stream(), 3, 9)
    seen: list[torch.Size] = []
    model.branch[2].register_forward_hook(lambda m, x, y: seen.append(y.shape))
    small, _ = minimized(model, random(5, 4))
    assert type(small.branch[2]) is nn.Linear
    seen.clear()
    small(random(5, 4))
    assert seen == [torch.Size([5, WIDTH])]
    kept_whole, _ = minimized(writing(linear_stream(), 3, 9), random(5, 4), keep=["branch.2"])
    assert kept_whole.branch[2](random(5, 24)).shape == (5, WIDTH)


def test_moments_follow_weight_and_bias() -> None:
    model = writing(linear_stream(), 3, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(random(5, 4)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        writing(model, 3, 9)
    moment = optimizer.state[model.branch[2].weight]["momentum_buffer"].clone()
    bias = optimizer.state[model.branch[2].bias]["momentum_buffer"].clone()
    small, report = minimize(model, random(5, 4))
    remap_optimizer(optimizer, report)
    layer, scatter = small.branch[2]
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], moment[[3, 9]])
    assert torch.equal(optimizer.state[scatter.bias]["momentum_buffer"], bias)


def test_the_module() -> None:
    scatter = OutputScatter(torch.tensor([4, 0]), 5, -2).double()
    scatter.bias.data = torch.arange(5.0, dtype=torch.float64)
    x = random(3, 2, 7)
    expected = torch.arange(5.0, dtype=torch.float64)[:, None].repeat(3, 1, 7)
    expected[:, 4] += x[:, 0]
    expected[:, 0] += x[:, 1]
    assert torch.equal(scatter(x), expected)
    assert torch.autograd.gradcheck(scatter, (x.requires_grad_(),))
    assert scatter(x[:0]).shape == (0, 5, 7)
    assert scatter(x[0]).shape == (5, 7)
    exported = torch.export.export(scatter, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), expected)
    compiled = torch.compile(scatter, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x.detach()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = nn.Sequential(nn.Linear(3, 2, bias=False), OutputScatter(torch.tensor([4, 0]), 5))
        assert narrow(torch.ones(1, 3)).dtype == torch.bfloat16
    assert copy.deepcopy(scatter).load_state_dict(scatter.state_dict())
    without = OutputScatter(torch.tensor([1]), 2, bias=False)
    assert torch.equal(without(torch.ones(1, 1)), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("index", "width", "dim", "message"),
    [
        ([5], 5, -1, "index must be below 5, got 5"),
        ([-1], 5, -1, "index must not be negative, got -1"),
        ([1, 1], 5, -1, "index must be distinct, got equal entries"),
        ([1], 5, 1, "dim must be negative, got 1"),
        ([[1]], 5, -1, "index must have 1 dimensions"),
    ],
)
def test_the_module_refuses(index: list[int], width: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"OutputScatter: {message}"):
        OutputScatter(torch.tensor(index), width, dim)
