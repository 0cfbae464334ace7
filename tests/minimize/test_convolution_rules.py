"""Rules of convolutions: padding, groups, transposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sapwood.minimize import AppendOnes, BorderBias2d
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


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "valid"])
def test_constants_through_uniform_padding_fold_into_the_bias(mode: str) -> None:
    padding = {"padding": 0} if mode == "valid" else {"padding": 1, "padding_mode": mode}
    conv = nn.Conv2d(3, 4, 3, **padding)  # type: ignore[arg-type]
    model = chain(nn.Conv2d(2, 3, 3), nn.Sigmoid(), conv)
    dead(model[0], 1, bias=0.4)
    small, report = minimized(model, random(2, 2, 8, 8))
    assert kept(report, "0") == [0, 2]
    assert type(small[2]) is nn.Conv2d  # type: ignore[index]
    assert largest_difference(model, small, random(3, 2, 7, 11)) <= 1e-9


SHAPES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 5), "padding": (1, 2)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 2, "padding": 1, "stride": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("border", ["table", "ones", "refuse"])
def test_constants_through_zero_padding(shape: dict[str, object], border: str) -> None:
    model = chain(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 4, **shape))  # type: ignore[arg-type]
    dead(model[0], 1, bias=0.4)
    small, report = minimized(model, random(2, 2, 9, 9), border=border)
    assert kept(report, "0") == ([0, 1, 2] if border == "refuse" else [0, 2])
    for size in ((9, 9), (7, 12), (4, 4), (12, 5)):
        assert largest_difference(model, small, random(2, 2, *size)) <= 1e-9
    kinds = {type(module) for module in small.modules()}
    assert (BorderBias2d in kinds) == (border == "table")
    assert (AppendOnes in kinds) == (border == "ones")


def test_zeros_through_zero_padding_need_no_table() -> None:
    model = chain(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    dead(model[0], 1, bias=-0.4)
    small, report = minimized(model, random(2, 2, 8, 8))
    assert kept(report, "0") == [0, 2]
    assert type(small[2]) is nn.Conv2d  # type: ignore[index]


def test_taps_that_never_leave_the_image_need_no_table() -> None:
    model = chain(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 4, 3, padding=1))
    dead(model[0], 1, bias=0.4)
    centre = model[2].weight.data[:, 1, 1, 1].clone()
    model[2].weight.data[:, 1] = 0.0
    model[2].weight.data[:, 1, 1, 1] = centre
    small, report = minimized(model, random(2, 2, 8, 8))
    assert kept(report, "0") == [0, 2]
    assert largest_difference(model, small, random(2, 2, 5, 6)) <= 1e-9


@pytest.mark.parametrize("border", ["table", "ones"])
def test_what_the_border_needs_grows_with_a_second_pass(border: str) -> None:
    model = chain(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    dead(model[0], 1, bias=0.4)
    small, _ = minimized(model, random(2, 2, 8, 8), border=border)
    _, unchanged = minimized(small, random(2, 2, 8, 8), border=border)
    assert unchanged.plan.edits == []
    dead(small[0], 0, bias=0.9)  # type: ignore[index]
    smaller, report = minimized(small, random(2, 2, 8, 8), border=border)
    assert kept(report, "0") == [1, 2]
    assert largest_difference(small, smaller, random(2, 2, 5, 7)) <= 1e-9


def test_what_varies_at_the_border_folds_into_a_linear_layer_behind_flatten() -> None:
    model = chain(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 36, 4),
    )
    dead(model[0], 1, bias=0.4)
    model[2].weight.data[2, [0, 2]] = 0.0  # reads the constant channel alone
    _, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 2]
    assert kept(report, "2") == [0, 1]


def test_what_varies_at_the_border_stays_behind_a_global_pool() -> None:
    """Its average depends on the size of the image, so that no number can replace it."""
    layers = {
        "one": nn.Conv2d(2, 3, 3, padding=1),
        "two": nn.Conv2d(3, 3, 3, padding=1),
        "head": nn.Linear(3, 4),
    }
    model = prepared(
        Net(lambda m, x: m.head(m.two(torch.sigmoid(m.one(x))).mean((2, 3))), **layers)
    )
    dead(model.one, 1, bias=0.4)
    model.two.weight.data[2, [0, 2]] = 0.0  # type: ignore[union-attr,operator,index]
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "two") == [0, 1, 2]
    assert largest_difference(model, small, random(2, 2, 9, 4)) <= 1e-9


def test_a_conv1d_and_a_conv3d() -> None:
    flat = chain(nn.Conv1d(2, 3, 3), nn.Sigmoid(), nn.Conv1d(3, 4, 3))
    dead(flat[0], 1, bias=0.4)
    _, report = minimized(flat, random(2, 2, 9))
    assert kept(report, "0") == [0, 2]
    deep = chain(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Conv3d(3, 4, 2, padding=1))
    dead(deep[0], 1, bias=-0.4)
    _, report = minimized(deep, random(2, 2, 5, 5, 5))
    assert kept(report, "0") == [0, 2]


def test_depthwise() -> None:
    model = chain(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 3, 1)
    )
    dead(model[2], 1)  # a constant: the input channel has no other reader
    dead(model[0], 2, bias=-0.3)  # a zero into a padded filter
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 3]
    assert small[2].groups == small[2].in_channels == 2  # type: ignore[index]


def test_depthwise_with_a_constant_at_the_border_stays() -> None:
    model = chain(
        nn.Conv2d(2, 4, 1),
        nn.Sigmoid(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 3, 1),
    )
    dead(model[0], 2, bias=0.3)
    _, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 1, 2, 3]


def test_depthwise_with_a_multiplier() -> None:
    model = chain(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
    unread(model[3], 2)
    unread(model[3], 3)
    unread(model[3], 5)  # its sister is read, so both stay
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 2]
    assert small[2].out_channels == 4  # type: ignore[index]


def test_a_multiplied_filter_that_is_left_alone_loses_rows_in_the_same_pass() -> None:
    model = chain(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    for column in (1, 2, 3):
        unread(model[3], column)
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "2") == [0]
    _, second = minimized(small, random(2, 2, 6, 6))
    assert second.plan.edits == []


def test_groups_stay_even() -> None:
    model = chain(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    for column in (0, 1):
        model[2].weight.data[:2, column] = 0.0
    model[2].weight.data[2:, 0] = 0.0
    small, report = minimized(model, random(2, 2, 6, 6))
    assert [j for j in kept(report, "0") if j < 3][-1] == 2
    assert len(kept(report, "0")) == 4
    assert (small[2].in_channels, small[2].groups) == (4, 2)  # type: ignore[index]


def test_a_whole_group_goes() -> None:
    model = chain(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    unread(model[3], 0)
    unread(model[3], 1)
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [3, 4, 5]
    assert (small[2].groups, small[2].out_channels) == (1, 2)  # type: ignore[index]


def test_groups_fold_constants() -> None:
    model = chain(nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=1, groups=2))
    dead(model[0], 1, bias=0.2)
    dead(model[0], 4, bias=-0.8)
    small, report = minimized(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 2, 3, 5]
    assert largest_difference(model, small, random(2, 2, 4, 7)) <= 1e-9


@pytest.mark.parametrize("bias", [-0.4, 0.4])
def test_transposed_convolution(bias: float) -> None:
    up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)
    model = chain(nn.Conv2d(2, 3, 1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(4, 2, 1))
    dead(model[0], 1, bias=bias)
    unread(model[4], 3)
    small, report = minimized(model, random(2, 2, 5, 5))
    assert kept(report, "0") == ([0, 2] if bias < 0 else [0, 1, 2])
    assert kept(report, "2") == [0, 1, 2]
    assert largest_difference(model, small, random(2, 2, 3, 6)) <= 1e-9
