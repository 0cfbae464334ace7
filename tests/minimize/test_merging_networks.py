"""``rules="exact+merge"``: products of layers, idle units, plans, files and whole networks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sapwood.minimize import OutputScatter, Plan, analyze, load, minimize, remap_optimizer, save
from tests.minimize.merging import MERGE, WIDE, copied, merge, untouched
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
    unread,
)

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


def test_products_are_compared_with_layers_as_narrow_as_the_exact_rules_make_them() -> None:
    """4 of 40 rows are written: 149 numbers apart for 5 units between, 107 for 3, else 108."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(m.wide(y) + m.second(m.first(y)))

    for inner, multiplied in ((5, True), (3, False)):
        layers = {
            "stem": nn.Linear(5, 16),
            "wide": nn.Linear(16, 40),
            "first": nn.Linear(16, inner),
            "second": nn.Linear(inner, 40),
            "head": nn.Linear(40, 3),
        }
        model = prepared(Net(forward, **layers))
        for row in range(4, 40):
            dead(model.second, row)
        exact, report = minimized(model, random(5, 5))
        assert isinstance(exact.second[1], OutputScatter)
        small, merged = minimized(model, random(5, 5), rules="exact+merge")
        assert (type(small.first) is nn.Identity) == multiplied
        assert isinstance(small.second[1], OutputScatter)
        assert (merged.parameters_after < report.parameters_after) == multiplied
        assert merged.parameters_after <= report.parameters_after
