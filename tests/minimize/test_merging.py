"""``rules="exact+merge"``: multiples of units, products of layers, units that nobody reads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import Plan, analyze, load, minimize, remap_optimizer, save
from sapwood.minimize.merging import _rounds
from sapwood.minimize.merging._rows import Multiples, Rows, multiples
from tests.minimize.models import CASES
from tests.minimize.planting import (
    Net,
    chain,
    dead,
    kept,
    largest_difference,
    mask_randomly,
    minimized,
    prepared,
    random,
    refusals,
    unread,
)

MERGE = "exact+merge"
#: A matrix in front or behind that makes no product of two layers worth it.
WIDE = 12


@torch.no_grad()
def copied(layer: nn.Module, source: int, to: int, factor: float = 1.0) -> None:
    """Makes a unit a multiple of another."""
    for tensor in (layer.weight, layer.bias):
        tensor[to] = factor * tensor[source]  # type: ignore[index,operator]


def merge(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, Any]:
    """Minimizes with merging; checks values, gradients, sizes and that a second pass is idle."""
    small, report = minimized(model, x, rules=MERGE, **options)
    gradients = []
    for network in (model, small):
        inputs = x.clone().requires_grad_(True)
        network(inputs).square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    scale = gradients[0].abs().max().clamp(min=1.0)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-8 * scale
    again, second = minimize(small, x, rules=MERGE, **options)
    assert second.plan.edits == []
    assert torch.equal(again(x), small(x))
    return small, report


def left_alone(model: nn.Module, x: Tensor, **options: Any) -> str:
    """What must hold where nothing merges: the same plan and bits as without; the refusals."""
    small, report = minimized(model, x, rules=MERGE, **options)
    exact, expected = minimized(model, x, **options)
    assert report.plan.edits == expected.plan.edits
    assert torch.equal(small(x), exact(x))
    return refusals(report)


def untouched(model: nn.Module, x: Tensor, **options: Any) -> str:
    """As ``left_alone`` where nothing can be cut at all: an empty plan copies the model."""
    plan = analyze(model, x, rules=MERGE, **options)
    assert plan.edits == []
    return "\n".join(map(str, plan.refusals))


# Equal units


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True),
        nn.GELU(),
        nn.Sigmoid(),
        nn.PReLU(1),
        nn.Dropout(0.5),
        nn.Identity(),
    ],
    ids=lambda a: str(a).replace(" ", ""),
)
def test_equal_units_become_one(activation: nn.Module) -> None:
    model = chain(nn.Linear(WIDE, 4), activation, nn.Linear(4, WIDE))
    copied(model[0], 0, 2)
    copied(model[0], 0, 3)
    small, report = merge(model, random(5, WIDE))
    assert kept(report, "0") == [0, 1]
    summed = model[2].weight[:, [0, 2, 3]].sum(1)
    torch.testing.assert_close(small[2].weight[:, 0], summed)  # type: ignore[index]
    assert "0: 2 units merged into multiples" in str(report.plan)


def test_without_the_rule_they_stay() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    copied(model[0], 0, 2)
    _, report = minimized(model, random(5, 4))
    assert report.plan.edits == []


def test_almost_equal_units_stay() -> None:
    for factor in (1.0, 0.7):
        model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        copied(model[0], 0, 2, factor)
        model[0].weight.data[2, 1] *= 1 + 2.0**-48
        assert untouched(model, random(5, 4)) == ""
        copied(model[0], 0, 2, factor)
        model[0].bias.data[2] *= 1 + 2.0**-48
        assert untouched(model, random(5, 4)) == ""


def test_equal_rows_with_other_biases_stay() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[2] = model[0].weight.data[0]
    assert untouched(model, random(5, 4)) == ""


def test_slopes_and_norms_must_be_equal_too() -> None:
    model = chain(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2))
    copied(model[0], 0, 2)
    assert untouched(model, random(5, 4)) == ""
    model[1].weight.data[2] = model[1].weight.data[0]
    small, report = merge(model, random(5, 4))
    assert kept(report, "0") == [0, 1]
    assert len(small[1].weight) == 2  # type: ignore[index]

    model = chain(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    copied(model[0], 0, 2)
    assert untouched(model, random(2, 2, 6, 6)) == ""
    for tensor in model[1].state_dict().values():
        if tensor.dim():
            tensor[2] = tensor[0]
    _, report = merge(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 1]
    copied(model[0], 0, 2, 0.5)  # a norm's shift does not scale
    assert untouched(model, random(2, 2, 6, 6)) == ""


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_convolutions_with_every_padding(mode: str) -> None:
    def conv(a: int, b: int) -> nn.Conv2d:
        return nn.Conv2d(a, b, 3, padding=1, padding_mode=mode)

    model = chain(conv(2, 4), nn.Sigmoid(), nn.MaxPool2d(2, padding=1), conv(4, 3))
    copied(model[0], 1, 3)
    small, report = merge(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [0, 1, 2]
    other = random(1, 2, 9, 5)
    assert largest_difference(model, small, other) <= 1e-9


@pytest.mark.parametrize("size", [1, 4])
def test_through_flatten_position_by_position(size: int) -> None:
    model = chain(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(size),
        nn.Flatten(),
        nn.Linear(4 * size * size, 3),
    )
    copied(model[0], 2, 0, 0.25)
    _, report = merge(model, random(2, 2, 6, 6))
    assert kept(report, "0") == [1, 2, 3]


def test_through_permutations_and_means() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = m.embed(x).flatten(2).transpose(1, 2)  # (N, T, C)
        return m.head(F.gelu(y).mean(1)) + m.other(y.permute(0, 2, 1)).mean(2)

    layers = {"embed": nn.Conv2d(3, 6, 2, stride=2), "head": nn.Linear(6, 4)}
    model = prepared(Net(forward, **layers, other=nn.Conv1d(6, 4, 3, padding=1)))
    copied(model.embed, 5, 1)
    _, report = merge(model, random(2, 3, 6, 6))
    assert kept(report, "embed") == [0, 2, 3, 4, 5] or kept(report, "embed") == [0, 1, 2, 3, 4]


def test_a_flatten_that_interleaves_units_and_positions() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = m.head(m.conv(x).relu().permute(0, 2, 3, 1).flatten(1))
        return result

    model = prepared(Net(forward, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4 * 16, 3)))
    copied(model.conv, 0, 3)
    _, report = merge(model, random(2, 2, 6, 6))
    assert kept(report, "conv") == [0, 1, 2]


def test_several_readers_and_hand_written_activations() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        h = h * torch.sigmoid(1.7 * h) + 0.5
        return m.a(h) * m.b(h)  # type: ignore[no-any-return]

    layers = {"up": nn.Linear(4, 5), "a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}
    model = prepared(Net(forward, **layers))
    copied(model.up, 1, 4)
    _, report = merge(model, random(5, 4))
    assert kept(report, "up") == [0, 1, 2, 3]
    assert [len(e["readers"]) for e in report.plan.edits if e["op"] == "merge"] == [2]


def test_rows_are_compared_without_what_folds() -> None:
    model = chain(
        nn.Linear(WIDE, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, WIDE)
    )
    dead(model[0], 1, bias=0.0)  # the constant 0.5
    unread(model[2], 3)
    with torch.no_grad():
        model[2].weight[2] = model[2].weight[0]
        model[2].weight[2, 1] += 2.0
        model[2].bias[2] = model[2].bias[0] - 1.0
    _, report = merge(model, random(5, WIDE))
    assert kept(report, "2") == [0, 1]


def test_merging_goes_on_where_it_makes_rows_equal() -> None:
    model = chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    copied(model[0], 0, 1)
    with torch.no_grad():
        # Equal once their inputs 0 and 1 are one; exact in binary.
        model[2].weight[4] = model[2].weight[3]
        model[2].weight[3, :2] = torch.tensor([0.5, 0.25])
        model[2].weight[4, :2] = torch.tensor([0.75, 0.0])
        model[2].bias[4] = model[2].bias[3]
    _, report = merge(model, random(5, 6))
    assert kept(report, "0") == [0, 2, 3]
    assert kept(report, "2") == [0, 1, 2, 3]


# Multiples


def test_positive_multiples_behind_relu_and_friends() -> None:
    for activation in (nn.LeakyReLU(), nn.PReLU(1)):
        model = chain(nn.Linear(WIDE, 4), activation, nn.Linear(4, WIDE))
        copied(model[0], 0, 2, 3.7)
        copied(model[0], 0, 3, 0.01)
        small, report = merge(model, random(5, WIDE))
        assert kept(report, "0") == [1, 2]  # the largest represents the others
        factors = torch.tensor([1.0, 1 / 3.7, 0.01 / 3.7], dtype=torch.float64)
        column = model[2].weight[:, [2, 0, 3]] @ factors
        torch.testing.assert_close(small[2].weight[:, 1], column)  # type: ignore[index]


def test_other_activations_take_no_multiples() -> None:
    for activation in (nn.GELU(), nn.ReLU6()):
        model = chain(nn.Linear(4, 3), activation, nn.Linear(3, 2))
        copied(model[0], 0, 2, 2.0)
        assert untouched(model, random(5, 4)) == ""


def test_a_negative_multiple_needs_a_way_without_activation() -> None:
    model = chain(nn.Linear(WIDE, 4), nn.ReLU(), nn.Linear(4, WIDE))
    copied(model[0], 0, 2, -0.5)
    assert untouched(model, random(5, WIDE)) == ""
    model[1] = nn.Dropout(0.5).eval()
    small, report = merge(model, random(5, WIDE))
    assert kept(report, "0") == [0, 1, 3]
    expected = model[2].weight[:, 0] - 0.5 * model[2].weight[:, 2]
    torch.testing.assert_close(small[2].weight[:, 0], expected)  # type: ignore[index]


def test_single_weights_of_a_hard_pruned_float32_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    model = chain(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 4)).float()
    with torch.no_grad():
        weight = torch.zeros(40, 3)
        places = torch.randint(0, 3, (40,), generator=generator)
        weight[torch.arange(40), places] = torch.randn(40, generator=generator)
        model[0].weight.copy_(weight)
        model[0].bias.zero_()
    x = random(6, 3).float()
    small, _ = minimize(model, x, rules=MERGE)
    assert small[0].out_features == 6  # type: ignore[index]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert minimize(small, x, rules=MERGE)[1].plan.edits == []


def test_two_ratios_of_float32_weights_are_told_apart() -> None:
    # The closest ratios that float32 has near 1: 16777215/16777216 and 16777214/16777215.
    top = float(2**24)
    weight = torch.tensor([[top, top - 1], [top - 1, top - 2]], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)
    rows = Rows(weight, zeros, zeros, torch.zeros(2, 0, dtype=torch.float64))
    assert multiples(rows, Multiples.POSITIVE) == []


@pytest.mark.parametrize("allowed", list(Multiples), ids=lambda a: a.name)
def test_wide_layers_against_all_pairs(allowed: Multiples) -> None:
    generator = torch.Generator().manual_seed(7)
    few = torch.randint(-2, 3, (120, 3), generator=generator).double() * 0.37
    bias = torch.randint(-1, 2, (120,), generator=generator).double() * 0.37
    labels = torch.randint(0, 2, (120, 1), generator=generator).double()
    found = multiples(Rows(few, bias, torch.zeros_like(bias), labels), allowed)
    full = torch.cat((few, bias[:, None]), 1)

    def related(a: int, b: int) -> bool:
        """By the cross products of all entries."""
        if labels[a] != labels[b]:
            return False
        if allowed is Multiples.EQUAL:
            return torch.equal(full[a], full[b])
        if not full[a].any() or not full[b].any():
            return not full[a].any() and not full[b].any()
        outer = full[a][:, None] * full[b]
        parallel = torch.allclose(outer, outer.T, rtol=0, atol=1e-12)
        return parallel and (allowed is Multiples.ANY or bool(full[a] @ full[b] > 0))

    gone = {g for _, g, _ in found}
    for kept_row, gone_row, factor in found:
        assert kept_row not in gone
        assert abs(factor) <= 1.0
        torch.testing.assert_close(full[gone_row], factor * full[kept_row])
        assert related(kept_row, gone_row)
    rest = [i for i in range(120) if i not in gone]
    assert not any(related(a, b) for i, a in enumerate(rest) for b in rest[:i])


def test_rows_that_overflow_are_left_alone() -> None:
    weight = torch.tensor([[5e-324, 1.0], [1e-323, 2.0], [1.0, 2.0]], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    rows = Rows(weight, zeros, zeros, torch.zeros(3, 0, dtype=torch.float64))
    assert multiples(rows, Multiples.POSITIVE) == []
    none = Rows(weight[:0], zeros[:0], zeros[:0], rows.labels[:0])
    assert multiples(none, Multiples.ANY) == []


@pytest.mark.slow
def test_a_layer_of_4096_units_takes_less_than_a_second() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator, dtype=torch.float64)
    weight[100:200] = 0.3 * weight[:100]
    zeros = torch.zeros(4096, dtype=torch.float64)
    rows = Rows(weight, zeros, zeros, torch.zeros(4096, 0, dtype=torch.float64))
    times = []
    for _ in range(3):
        start = time.process_time()
        found = multiples(rows, Multiples.POSITIVE)
        times.append(time.process_time() - start)
    assert [(k, g) for k, g, _ in found] == [(i, i + 100) for i in range(100)]
    assert min(times) < 1.0


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


# Products


def test_a_chain_is_multiplied_out() -> None:
    model = chain(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 3))
    small, report = merge(model, random(5, 6))
    assert type(small[0]) is nn.Identity  # type: ignore[index]
    torch.testing.assert_close(small[2].weight, model[2].weight @ model[0].weight)  # type: ignore[index]
    shift = model[2].weight @ model[0].bias + model[2].bias
    torch.testing.assert_close(small[2].bias, shift)  # type: ignore[index]
    assert "2 holds its product with 0" in str(report.plan)


def test_a_product_that_is_not_smaller_is_left_alone() -> None:
    # Apart 6 * 4 + 4 * 12 = 72 weights, together 6 * 12 = 72; biases 4 + 12 against 12.
    model = chain(nn.Linear(6, 4, bias=False), nn.Linear(4, 12, bias=False))
    assert untouched(model, random(5, 6)) == ""
    model = chain(nn.Linear(6, 4), nn.Linear(4, 12))
    _, report = merge(model, random(5, 6))
    assert (report.parameters_before, report.parameters_after) == (88, 84)
    model = chain(nn.Linear(6, 4), nn.Linear(4, 12, bias=False))  # 76 against 84
    assert untouched(model, random(5, 6)) == ""


def test_longer_chains_and_pointwise_convolutions() -> None:
    model = chain(nn.Linear(6, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 5), nn.Linear(5, 4))
    small, _ = merge(model, random(5, 6))
    assert [type(layer) for layer in small] == [nn.Identity] * 3 + [nn.Linear]  # type: ignore[attr-defined]
    model = chain(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    small, _ = merge(model, random(2, 3, 6, 6))
    assert small[1].weight.shape == (4, 3, 1, 1)  # type: ignore[index]
    for first in (nn.Conv2d(3, 9, 1, stride=2), nn.Conv2d(3, 9, 1, padding=1), nn.Conv2d(3, 9, 3)):
        model = chain(first, nn.Conv2d(9, 4, 1))
        assert untouched(model, random(2, 3, 6, 6)) == ""


def test_chains_with_other_readers_or_something_between_stay() -> None:
    def twice(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.second(h) + m.third(h)  # type: ignore[no-any-return]

    layers = {"first": nn.Linear(6, 20), "second": nn.Linear(20, 3), "third": nn.Linear(20, 3)}
    assert untouched(prepared(Net(twice, **layers)), random(5, 6)) == ""
    model = chain(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    assert untouched(model, random(5, 6)) == ""
    model = chain(nn.Linear(6, 20), nn.Linear(20, 3))
    assert "kept as asked" in untouched(model, random(5, 6), keep=["0"])
    model = chain(nn.Linear(6, 1), nn.Linear(1, 1))
    assert untouched(model, random(5, 6), keep=["0"]) == ""
    small, _ = merge(model, random(5, 6))
    assert type(small[0]) is nn.Identity  # type: ignore[index]


def test_inputs_that_are_picked_count_in_the_product() -> None:
    model = chain(nn.Linear(40, 20), nn.Linear(20, 8))
    unread(model[0], 0)
    model[0].weight.data[:, 6:] = 0.0  # InputSelect(5) in front of both forms
    small, report = merge(model, random(5, 40))
    assert report.parameters_after == 5 + 5 * 8 + 8
    assert minimize(small, random(5, 40), rules=MERGE)[1].plan.edits == []


# Units that nobody reads


def test_a_constant_branch_reads_nothing_but_the_stream_it_sits_on() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(torch.relu(y + m.down(torch.relu(m.up(y)))))  # type: ignore[no-any-return]

    layers = {"stem": nn.Linear(6, 16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}
    model = prepared(Net(forward, **layers, head=nn.Linear(16, 12)))
    model.down.weight.data.zero_()
    unread(model.head, 3)
    _, expected = minimized(model, random(5, 6))
    _, report = merge(model, random(5, 6))
    assert 3 in kept(expected, "stem")  # though only the dead branch reads it
    assert 3 not in kept(report, "stem")
    assert report.parameters_after < expected.parameters_after
    assert "up computes 1 unit for nobody" in str(report.plan)


# Plans, files, optimizers, types


def merging_net() -> nn.Sequential:
    """Multiples, a chain, a constant unit and an unread one."""
    model = chain(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 20),
        nn.Identity(),
        nn.Linear(20, 6),
        nn.Sigmoid(),
        nn.Linear(6, 3),
    )
    copied(model[0], 0, 5, 0.3)
    copied(model[4], 2, 3)
    dead(model[0], 7, bias=0.4)
    unread(model[6], 0)
    return model


def build_merging_net() -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(layer) for layer in merging_net()))


def test_everything_at_once_through_json_and_files(tmp_path: Path) -> None:
    model, x = merging_net(), random(5, 6)
    small, report = merge(model, x)
    ops = {edit["op"] for edit in report.plan.edits}
    assert ops == {"merge", "multiply", "slice", "fold"}
    plan = Plan.from_json(report.plan.to_json())
    assert str(plan) == str(report.plan)
    applied = plan.apply(model)
    assert list(applied.state_dict()) == list(small.state_dict())
    assert torch.equal(applied(x), small(x))
    assert analyze(model, x, rules=MERGE).edits == report.plan.edits
    save(small, tmp_path / "small.safetensors", report=report)
    again = load(tmp_path / "small.safetensors", build_merging_net)
    assert torch.equal(again(x), small(x))
    assert type(again[2]) is nn.Identity  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_round_the_sums_once(dtype: torch.dtype) -> None:
    model = merging_net().to(dtype)
    x = random(64, 6).to(dtype)
    small, _ = minimize(model, x, rules=MERGE)
    assert {p.dtype for p in small.parameters()} == {dtype}
    reference = copy.deepcopy(model).double()(x.double())
    errors = [(net(x).double() - reference).abs().max().item() for net in (model, small)]
    ulp = torch.finfo(dtype).eps * reference.abs().max().item()
    assert errors[1] <= 1.5 * errors[0] + ulp
    wide, _ = minimize(copy.deepcopy(model).double(), x.double(), rules=MERGE)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(dtype)), name


def test_an_optimizer_keeps_the_moments_of_the_kept_units() -> None:
    model = chain(nn.Linear(WIDE, 4), nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 5), nn.ReLU())
    copied(model[0], 0, 2, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(random(5, WIDE)).square().sum().backward()
    optimizer.step()
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    small, report = minimize(model, random(5, WIDE), rules=MERGE)
    assert set(report.param_map) == {"0.weight", "0.bias", "3.bias"}
    remap_optimizer(optimizer, report)
    assert len(optimizer.param_groups[0]["params"]) == 3
    state = {
        name: optimizer.state[p] for name, p in small.named_parameters() if p in optimizer.state
    }
    assert set(state) == {"0.weight", "0.bias", "3.bias"}
    assert torch.equal(state["0.weight"]["exp_avg"], before["0.weight"][[0, 1, 3]])
    assert torch.equal(state["3.bias"]["exp_avg"], before["3.bias"])
    small(random(5, WIDE)).square().sum().backward()
    optimizer.step()


def test_the_gradient_of_a_merged_column_is_that_of_the_kept_one() -> None:
    model = chain(nn.Linear(WIDE, 4), nn.ReLU(), nn.Linear(4, WIDE))
    copied(model[0], 0, 2, 0.5)
    small, report = minimize(model, random(5, WIDE), rules=MERGE)
    for network in (model, small):
        network(random(5, WIDE)).square().sum().backward()
    for name in ("2.weight", "2.bias"):
        moved = report.param_map[name].slice(model.get_parameter(name).grad)  # type: ignore[arg-type]
        torch.testing.assert_close(small.get_parameter(name).grad, moved)


def test_masks_and_inplace() -> None:
    model = merging_net()
    mask = {"0.weight": torch.ones(8, 6, dtype=torch.bool)}
    mask["0.weight"][1] = False
    x = random(5, 6)
    small, report = minimize(model, x, rules=MERGE, masks=mask)
    assert 1 not in kept(report, "0")
    same, _ = minimize(model, x, rules=MERGE, masks=mask, inplace=True)
    assert same is model
    assert torch.equal(model(x), small(x))


def test_unknown_rules_raise() -> None:
    with pytest.raises(ValueError, match=r"rules must be one of exact, exact\+merge, got 'merge'"):
        analyze(merging_net(), random(5, 6), rules="merge")


#: Where units reach their readers through entrywise operations alone.
MERGED = {
    "small_lenet": {"fc1", "fc2"},
    "any_size_convnet": {"conv1", "conv3"},
    "convnext": {"stages.0.0.expand", "stages.1.2.expand"},
    "vit": {"blocks.0.expand", "blocks.1.expand"},
    "encoder_vit": {"encoder.layers.0.linear1"},
    "mixer": {"blocks.0.mix.0", "blocks.0.channels.0"},
}


#: What the others show already; together they take 20 s.
SLOW = ("vit", "small_gpt", "resnet_projection", "any_size_resnet", "lenet300")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_whole_networks(name: str) -> None:
    case = CASES[name]
    model = case.make(0)
    mask_randomly(model, 0, density=0.3)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
            with torch.no_grad():
                module.weight[-4:] = torch.full_like(module.weight[0], 0.3)
                if module.bias is not None:
                    module.bias[-4:] = 0.1
    x = case.inputs(2)
    small, report = minimize(model, x, rules=MERGE)
    for inputs in (case.inputs(5), *([case.other_size(3)] if case.other_size else [])):
        assert largest_difference(model, small, inputs) <= 1e-9
    again, second = minimize(small, x, rules=MERGE)
    assert second.plan.edits == []
    assert torch.equal(again(x), small(x))
    exact = analyze(model, x)
    ops = {edit["op"] for edit in exact.edits}
    assert not ops & {"merge", "multiply", "thin"}
    assert sum(p.numel() for p in small.parameters()) <= sum(
        p.numel() for p in exact.apply(model).parameters()
    )
    merged = {edit["module"] for edit in report.plan.edits if edit["op"] == "merge"}
    assert merged >= MERGED.get(name, set())
