"""``rules="exact+merge"``: units that are multiples of others."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import minimize
from sapwood.minimize.merging._rows import Multiples, Rows, multiples
from tests.minimize.merging import MERGE, WIDE, copied, merge, untouched
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
