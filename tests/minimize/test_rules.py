"""Every row of the rule table: what goes, what stays, and that the function is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
)
from tests.minimize.planting import kept, largest_difference, minimized


class Net(nn.Module):
    """Named layers and a forward pass given as a function."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def chain(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row, in float64 and evaluation mode, with lively norms."""
    torch.manual_seed(0)
    return prepared(nn.Sequential(*layers))  # type: ignore[return-value]


def prepared(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.double().eval()


def dead(layer: nn.Module, row: int, bias: float | None = None) -> None:
    """Zeroes a row of a weight; its bias becomes the unit's constant."""
    layer.weight.data[row] = 0.0  # type: ignore[union-attr,operator,index]
    if bias is not None:
        layer.bias.data[row] = bias  # type: ignore[union-attr,operator,index]


def unread(layer: nn.Module, column: int) -> None:
    layer.weight.data[:, column] = 0.0  # type: ignore[union-attr,operator,index]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# Linear layers and activations


def test_a_constant_unit_folds_into_the_next_bias_through_the_activation() -> None:
    model = chain(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    dead(model[0], 1, bias=0.7)
    small, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [0, 2]
    expected = model[2].bias + model[2].weight[:, 1] * torch.sigmoid(torch.tensor(0.7))
    torch.testing.assert_close(small[2].bias, expected)  # type: ignore[index]


def test_a_bias_is_created_where_there_was_none() -> None:
    model = chain(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2, bias=False))
    dead(model[0], 1, bias=0.7)
    small, _ = minimized(model, random(5, 4))
    assert small[2].bias is not None  # type: ignore[index]


def test_no_bias_is_created_for_a_zero() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    dead(model[0], 1, bias=-0.7)
    small, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [0, 2]
    assert small[2].bias is None  # type: ignore[index]


def test_an_unread_unit_goes() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    unread(model[2], 0)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [1, 2]


def test_death_spreads_through_layers_both_ways() -> None:
    model = chain(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    unread(model[4], 3)
    model[2].weight.data[:3, 1] = 0.0  # unit 1 of layer 0 is read by unit 3 alone
    dead(model[0], 0, bias=0.3)
    model[2].weight.data[2, 1:] = 0.0  # unit 2 reads the constant unit alone
    _, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [2, 3]
    assert kept(report, "2") == [0, 1]


def test_a_row_that_cancels_is_no_dead_row() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    _, report = minimized(model, random(5, 4))
    assert report.plan.edits == []


def test_minus_zero_is_zero() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].weight.data[:, 0] = -0.0
    _, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [1, 2]


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Tanh(),
    nn.Hardswish(),
    nn.ELU(),
    nn.CELU(),
    nn.SELU(),
    nn.LeakyReLU(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Hardsigmoid(),
    nn.Hardtanh(),
    nn.Mish(),
    nn.LogSigmoid(),
    nn.Softsign(),
    nn.PReLU(3),
    nn.PReLU(1),
    nn.Dropout(0.5),
    nn.Identity(),
    nn.ReLU(inplace=True),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: str(a).replace(" ", ""))
def test_activations(activation: nn.Module) -> None:
    model = chain(nn.Linear(4, 3), activation, nn.Linear(3, 2))
    dead(model[0], 1, bias=0.7)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "0") == [0, 2]


@pytest.mark.parametrize("function", ["gate", "swiglu", "squeeze"])
def test_a_zero_factor_takes_the_other_factor_along(function: str) -> None:
    forwards: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "gate": lambda m, x: m.down(m.a(x) * m.b(x)),
        "swiglu": lambda m, x: m.down(F.silu(m.a(x)) * m.b(x)),
        "squeeze": lambda m, x: m.down(m.b(x) * m.a(x)),
    }
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "down": nn.Linear(3, 2)}
    model = prepared(Net(forwards[function], **layers))
    dead(model.a, 1, bias=0.0)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "a") == kept(report, "b") == [0, 2]


def test_a_constant_factor_other_than_zero_stays() -> None:
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "down": nn.Linear(3, 2)}
    model = prepared(Net(lambda m, x: m.down(m.a(x) * m.b(x)), **layers))
    dead(model.a, 1, bias=0.5)
    dead(model.a, 2, bias=0.5)
    dead(model.b, 2, bias=-0.5)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "a") == [0, 1]


def test_zero_times_what_may_be_infinite_stays() -> None:
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "down": nn.Linear(3, 2)}
    model = prepared(Net(lambda m, x: m.down(m.a(x) * torch.exp(m.b(x))), **layers))
    dead(model.a, 1, bias=0.0)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "a") == [0, 1, 2]


def test_glu() -> None:
    model = prepared(
        Net(lambda m, x: m.down(gated(m.up(x))), up=nn.Linear(4, 6), down=nn.Linear(3, 2))
    )
    unread(model.down, 1)
    _, report = minimized(model, random(5, 4))
    assert kept(report, "up") == [0, 2, 3, 5]


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(b)


# Convolutions


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


def test_the_border_table_grows_with_a_second_pass() -> None:
    model = chain(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    dead(model[0], 1, bias=0.4)
    small, _ = minimized(model, random(2, 2, 8, 8))
    dead(small[0], 0, bias=0.9)  # type: ignore[index]
    smaller, report = minimized(small, random(2, 2, 8, 8))
    assert kept(report, "0") == [1, 2]
    assert type(smaller[2]) is BorderBias2d  # type: ignore[index]
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


# Norms


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


# Positions


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
