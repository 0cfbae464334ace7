"""``rules="exact+merge"``: units that something else reads, and steps that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize.merging import _rounds
from tests.minimize.merging import MERGE, WIDE, copied, left_alone, merge, untouched
from tests.minimize.planting import (
    Net,
    chain,
    kept,
    minimized,
    prepared,
    random,
    refusals,
)

# What reads units in another way


def residual(m: nn.Module, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.head(m.down(torch.relu(h)) + h)  # type: ignore[no-any-return]


def joined(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.relu(m.up(x))
    return m.wide(torch.cat((m.down(h), h), -1))  # type: ignore[no-any-return]


def normed(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(F.layer_norm(m.up(x), (4,)))  # type: ignore[no-any-return]


def shared(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(m.down(torch.relu(m.up(x))))  # type: ignore[no-any-return]


def computed(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(torch.relu(m.up(x)), m.down.weight * 2.0)


def gated(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(m.up(x) * x[:, :4])  # type: ignore[no-any-return]


def scaled(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(m.up(x) * m.gain)  # type: ignore[no-any-return]


def picked(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.relu(m.up(x))
    return m.down(h) + h[:, :1]  # type: ignore[no-any-return]


def returned(m: nn.Module, x: Tensor) -> Tensor:
    h = m.up(x)
    return torch.stack((m.down(torch.relu(h)), h))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (residual, "multiples of other units, but add reads them too"),
        (joined, "multiples of other units, but cat reads them too"),
        (normed, "layer_norm"),
        (shared, "down.weight is shared by 2 operations"),
        (computed, "the weight is computed, not a parameter"),
        (gated, "mul combines channels with an axis that has none"),
        (scaled, "mul reads them too"),
        (picked, "slice picks channels by fixed numbers"),
        (returned, ""),  # outputs of the model are no refusal
    ],
    ids=lambda a: getattr(a, "__name__", ""),
)
def test_units_with_other_readers_stay(forward: Callable[..., Tensor], reason: str) -> None:
    layers = {"up": nn.Linear(6, 4), "down": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    net = Net(forward, **layers, wide=nn.Linear(8, 3))
    net.gain = nn.Parameter(torch.empty(4))
    model = prepared(net)
    copied(model.up, 0, 2)
    assert reason in left_alone(model, random(5, 6))


def test_a_stream_is_no_unit() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up = nn.Linear(6, 5), nn.Linear(5, 7)
            self.down, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(y + self.down(torch.relu(self.up(y))))  # type: ignore[no-any-return]

    model = prepared(Block())
    copied(model.stem, 0, 1)
    copied(model.down, 0, 1)
    assert "stem: 1 channels stay: multiples of other units" in untouched(model, random(4, 6))
    copied(model.up, 2, 6, 1.5)
    _, report = merge(model, random(4, 6))
    assert kept(report, "up") == [0, 1, 3, 4, 5, 6]


def test_hooks_and_keep() -> None:
    def build() -> nn.Sequential:
        model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        copied(model[0], 0, 2)
        return model

    for name in ("0", "1"):
        assert "kept as asked" in untouched(build(), random(5, 4), keep=[name])
        model = build()
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: None)
        assert "read by a hook" in untouched(model, random(5, 4))
    _, report = merge(build(), random(5, 4), keep=["2"])
    assert kept(report, "0") == [0, 1]


def test_the_outputs_of_the_model_never_merge() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    copied(model[2], 0, 1)
    assert untouched(model, random(5, 4)) == ""


def test_grouped_and_transposed_convolutions_are_left_alone() -> None:
    for reader in (nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3)):
        model = chain(nn.Conv2d(2, 4, 3), nn.ReLU(), reader)
        copied(model[0], 0, 2)
        assert "reads them too" in untouched(model, random(2, 2, 8, 8))


def test_a_width_that_the_code_repeats() -> None:
    def halves(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.relu(m.up(x)).view(len(x), 2, 3)
        return m.down(h.flatten(1))  # type: ignore[no-any-return]

    def whole(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(torch.relu(m.up(x)).view(len(x), 6))  # type: ignore[no-any-return]

    for forward, reason in ((halves, ""), (whole, "up: 6 channels stay: the model's code does")):
        model = prepared(Net(forward, up=nn.Linear(WIDE, 6), down=nn.Linear(6, WIDE)))
        copied(model.up, 0, 3)
        assert reason in untouched(model, random(5, WIDE))


# Trials


def test_a_merge_that_fails_is_given_up_and_the_others_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for layer in (model[0], model[2]):
        copied(layer, 0, 1)
    operate = _rounds.operate

    def broken(source: nn.Module, edits: Any) -> nn.Module:
        """Merging the first layer goes wrong."""
        result = operate(source, edits)
        if any(edit["op"] == "merge" and edit["module"] == "0" for edit in edits):
            result[4].bias.data += 1.0  # type: ignore[index,union-attr,operator]
        return result

    monkeypatch.setattr(_rounds, "operate", broken)
    _, report = minimized(model, random(5, 6), rules=MERGE)
    assert kept(report, "0") == [0, 1, 2, 3]
    assert kept(report, "2") == [0, 2, 3, 4]
    assert "0: 1 channels stay: multiples of other units, but the outputs would differ by" in (
        refusals(report)
    )


def test_a_product_that_the_code_does_not_follow_is_given_up() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.second(m.first(x)) * m.first.weight.dim()  # type: ignore[no-any-return]

    model = prepared(Net(forward, first=nn.Linear(6, 20), second=nn.Linear(20, 3)))
    text = untouched(model, random(5, 6))
    assert "second: left alone: not multiplied out: the model's code does not follow" in text
