"""Rules of norms, pools, views, residual streams, embeddings, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import (
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
)
from tests.minimize.planting import (
    Net,
    chain,
    dead,
    kept,
    largest_difference,
    minimized,
    prepared,
    random,
    unread,
)


def test_batch_norm_moves_a_constant() -> None:
    model = chain(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    dead(model[0], 1)
    model[1].bias.data[1] = 5.0  # a constant above zero behind the norm
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 2]
    assert small[1].num_features == 2  # type: ignore[index]


def test_batch_norm_without_a_gain_is_its_bias() -> None:
    model = chain(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    model[1].weight.data[0] = 0.0
    _, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [1, 2]


def test_instance_norm() -> None:
    norm = nn.InstanceNorm2d(3, affine=True)
    model = chain(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Conv2d(3, 2, 1))
    dead(model[0], 1, bias=0.3)
    _, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 2]


def test_group_norm() -> None:
    model = chain(nn.Conv2d(2, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    for channel in (1, 3, 5):
        dead(model[0], channel, bias=0.3 * channel)
        model[1].weight.data[channel] = 0.0
    small, report = minimized(model, random(2, 2, 6, 6))
    assert len(kept(report, "0")) == 4  # two of three in the fuller group
    assert type(small[1]) is CompensatedGroupNorm  # type: ignore[index]
    assert largest_difference(model, small, random(2, 2, 3, 9)) <= 1e-9


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=["layer", "rms"])
def test_norms_compensate_for_constants(norm: nn.Module) -> None:
    model = chain(nn.Linear(5, 4), norm, nn.Linear(4, 3))
    dead(model[0], 1, bias=0.6)
    dead(model[0], 2, bias=-0.9)
    norm.weight.data[1] = 0.0  # type: ignore[union-attr,operator,index]
    unread(model[2], 2)
    small, report = minimized(model, random(6, 5))
    assert kept(report, "0") == [0, 3]
    assert type(small[1]) in (CompensatedLayerNorm, CompensatedRMSNorm)  # type: ignore[index]


def test_a_second_pass_over_a_compensated_norm() -> None:
    model = chain(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    dead(model[0], 1, bias=0.6)
    model[1].weight.data[1] = 0.0
    small, _ = minimized(model, random(6, 5))
    dead(small[0], 2, bias=-1.1)  # type: ignore[index]
    small[1].weight.data[2] = 0.0  # type: ignore[index]
    smaller, report = minimized(small, random(6, 5))
    assert kept(report, "0") == [0, 1, 3, 4]
    assert smaller[1].total == 6  # type: ignore[index]


def test_a_live_channel_stays_behind_a_norm() -> None:
    """With gain 0 and no reader it still moves mean and variance."""
    model = chain(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model[1].weight.data[1] = 0.0
    unread(model[2], 1)
    _, report = minimized(model, random(6, 5))
    assert kept(report, "0") == [0, 1, 2, 3]


def test_layer_scale() -> None:
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    model = prepared(Net(lambda m, x: m.head(F.relu(m.a(x)) * m.gamma), **layers))
    model.gamma = nn.Parameter(torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64))
    small, report = minimized(model, random(5, 4))
    assert kept(report, "a") == [0, 2]
    assert small.gamma.shape == (2,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pool", "folds"),
    [
        (nn.MaxPool2d(3, 2, padding=1), True),
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), True),
        (nn.AvgPool2d(3, padding=1), False),
        (nn.AvgPool2d(2, ceil_mode=True), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.AdaptiveAvgPool2d(2), True),
        (nn.AdaptiveMaxPool2d(2), True),
        (nn.Upsample(scale_factor=2), True),
        (nn.Upsample(scale_factor=2, mode="bilinear"), True),
    ],
    ids=str,
)
def test_pooling(pool: nn.Module, folds: bool) -> None:
    model = chain(nn.Conv2d(2, 3, 1), nn.Sigmoid(), pool, nn.Conv2d(3, 2, 1))
    dead(model[0], 1, bias=0.3)
    small, report = minimized(model, random(2, 2, 7, 7))
    assert kept(report, "0") == ([0, 2] if folds else [0, 1, 2])
    assert largest_difference(model, small, random(2, 2, 9, 6)) <= 1e-9


def test_pixel_shuffle_takes_whole_blocks() -> None:
    model = chain(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
    unread(model[2], 1)
    _, report = minimized(model, random(2, 2, 5, 5))
    assert kept(report, "0") == [0, 1, 2, 3, 8, 9, 10, 11]


def test_flatten() -> None:
    model = chain(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    model[3].weight.data[:, 16:32] = 0.0
    small, report = minimized(model, random(2, 2, 4, 4))
    assert kept(report, "0") == [0, 2]
    assert small[3].in_features == 32  # type: ignore[index]


def test_concatenation_and_chunks() -> None:
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "head": nn.Linear(6, 2)}
    model = prepared(
        Net(lambda m, x: m.head(torch.cat((m.a(x), torch.sigmoid(m.b(x))), 1)), **layers)
    )
    unread(model.head, 1)
    dead(model.b, 2, bias=0.3)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "a") == [0, 2]
    assert kept(report, "b") == [0, 1]


def test_channel_shuffle_keeps_groups_even() -> None:
    def shuffled(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.b(y)

    model = prepared(Net(shuffled, a=nn.Conv2d(2, 6, 1), b=nn.Conv2d(6, 2, 1)))
    unread(model.b, 0)
    unread(model.b, 1)  # channels 0 and 3 of the first layer
    unread(model.b, 2)  # channel 1, whose partner 4 is read
    _, report = minimized(model, random(2, 2, 4, 4))
    assert kept(report, "a") == [1, 2, 4, 5]


def test_permutation_and_other_layouts() -> None:
    layers = {"conv": nn.Conv2d(2, 4, 1), "head": nn.Linear(4, 3)}
    model = prepared(Net(lambda m, x: m.head(torch.relu(m.conv(x)).permute(0, 2, 3, 1)), **layers))
    unread(model.head, 2)
    _, report = minimized(model, random(2, 2, 4, 5))
    assert kept(report, "conv") == [0, 1, 3]


def test_a_stream_channel_needs_all_writers_and_readers() -> None:
    layers = {"stem": nn.Linear(4, 4), "branch": nn.Linear(4, 4), "head": nn.Linear(4, 2)}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(y + torch.tanh(m.branch(y)))

    model = prepared(Net(forward, **layers))
    for layer in (model.stem, model.branch):
        dead(layer, 0, bias=0.5)  # all writers constant
    dead(model.stem, 1, bias=0.5)  # one writer alone
    unread(model.head, 2)  # one reader alone
    unread(model.head, 3)
    unread(model.branch, 3)  # no reader at all
    _, report = minimized(model, random(5, 4))
    assert kept(report, "stem") == kept(report, "branch") == [1, 2]


def test_in_place_operations_on_the_stream() -> None:
    layers = {"stem": nn.Linear(4, 4), "branch": nn.Linear(4, 4), "head": nn.Linear(4, 2)}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        z = m.branch(y)
        y.relu_()  # after the branch has read it
        y += z
        return m.head(y)

    model = prepared(Net(forward, **layers))
    dead(model.stem, 0, bias=-0.5)
    dead(model.branch, 0, bias=0.25)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "stem") == [1, 2, 3]


def test_embedding() -> None:
    model = chain(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.data[:, 2] = 0.4
    unread(model[2], 0)
    small, report = minimized(model, torch.randint(0, 7, (3, 5)))
    assert kept(report, "0") == [1, 3]
    assert small[0].embedding_dim == 2  # type: ignore[index]


def test_input_features_that_nobody_reads_are_not_stored() -> None:
    model = chain(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:, :15] = 0.0
    small, report = minimized(model, random(5, 20))
    select, layer = small[0]  # type: ignore[index]
    assert isinstance(select, InputSelect)
    assert layer.in_features == 5
    assert report.param_map["0.weight"].name == "0.1.weight"
    small[0][1].weight.data[:, 2] = 0.0  # type: ignore[index]
    smaller, _ = minimized(small, random(5, 20))
    assert smaller[0][0].index.tolist() == [15, 16, 18, 19]  # type: ignore[index]


def test_the_output_never_shrinks() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    dead(model[2], 2, bias=0.5)
    small, _ = minimized(model, random(5, 4))
    assert small(random(5, 4)).shape == (5, 5)


def test_a_layer_never_becomes_empty() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    model[0].weight.data.zero_()
    small, report = minimized(model, random(5, 4))
    assert len(kept(report, "0")) == 1
    assert small(random(5, 4)).shape == (5, 5)


# What carries removed channels through a norm


def behind_norm(norm: nn.Module) -> nn.Sequential:
    """Four of eight channels are constants in front of the norm, with readers behind it."""
    model = chain(nn.Linear(5, 8), norm, nn.Linear(8, 3))
    for channel, constant in ((1, 0.6), (2, -0.9), (4, 0.3), (6, 1.2)):
        dead(model[0], channel, bias=constant)
    return model


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer", "rms"])
def test_features_of_a_norm_carry_what_its_readers_still_use(norm: nn.Module) -> None:
    model = behind_norm(norm)
    small, report = minimized(model, random(6, 5))
    assert kept(report, "0") == [0, 3, 5, 7]
    features = 2 if isinstance(norm, nn.LayerNorm) else 1
    assert small[2].in_features == 4 + features  # type: ignore[index]
    again, second = minimized(small, random(6, 5))
    assert second.plan.edits == []
    assert torch.equal(again(random(6, 5)), small(random(6, 5)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer", "rms"])
def test_features_move_with_what_later_passes_remove(norm: nn.Module) -> None:
    small, _ = minimized(behind_norm(norm), random(6, 5))
    dead(small[0], 1, bias=-2.0)  # type: ignore[index]
    smaller, report = minimized(small, random(6, 5))
    assert kept(report, "0") == [0, 2, 3]
    assert smaller[1].total == 8  # type: ignore[index]
    assert smaller[2].in_features == small[2].in_features - 1  # type: ignore[index]


def test_features_go_through_permutations_into_a_strided_convolution() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.down(y) + m.other(y)

    layers = {
        "stem": nn.Conv2d(2, 8, 1),
        "norm": nn.LayerNorm(8),
        "down": nn.Conv2d(8, 3, 2, stride=2),
        "other": nn.Conv2d(8, 3, 1, stride=2, bias=False),
    }
    model = prepared(Net(forward, **layers))
    for channel in (1, 2, 4, 6):
        dead(model.stem, channel, bias=0.3 * channel)
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "stem") == [0, 3, 5, 7]
    assert small.down.in_channels == small.other.in_channels == 6  # type: ignore[union-attr]
    assert small.other.bias is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("reader", ["activation", "padding", "output"])
def test_a_reader_that_is_not_linear_per_token_blocks_the_features(reader: str) -> None:
    functions: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "activation": lambda m, y: m.head(y.permute(0, 3, 1, 2)) + m.head2(F.relu(y)).mean(),
        "padding": lambda m, y: m.padded(y.permute(0, 3, 1, 2)),
        "output": lambda m, y: y,
    }
    layers = {
        "stem": nn.Conv2d(2, 8, 1),
        "norm": nn.LayerNorm(8),
        "head": nn.Conv2d(8, 3, 1),
        "head2": nn.Linear(8, 3),
        "padded": nn.Conv2d(8, 3, 3, padding=1),
    }
    function = functions[reader]
    model = prepared(Net(lambda m, x: function(m, m.norm(m.stem(x).permute(0, 2, 3, 1))), **layers))
    for channel in (1, 2, 4, 6):
        dead(model.stem, channel, bias=0.3 * channel)
    _, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "stem") == list(range(8))


def test_features_that_save_no_column_are_not_made() -> None:
    model = chain(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    dead(model[0], 1, bias=0.6)
    dead(model[0], 2, bias=-0.6)
    _, report = minimized(model, random(6, 5))
    assert kept(report, "0") == [0, 1, 2, 3]
