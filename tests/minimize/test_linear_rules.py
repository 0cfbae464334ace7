"""Rules of linear layers, activations and gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.minimize.planting import Net, chain, dead, kept, minimized, prepared, random, unread


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
