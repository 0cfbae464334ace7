"""Masks, options, errors, plans, optimizers and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sapwood.minimize import (
    MinimizeError,
    Plan,
    analyze,
    load,
    minimize,
    remap_optimizer,
    save,
)
from sapwood.minimize import api as minimize_api
from sapwood.nn import MaskedConv2d, MaskedLinear
from sapwood.pruning import MaskMatchError, MaskSet
from tests.minimize.planting import Net, chain, dead, kept, random, refusals, unread


def small_net() -> nn.Sequential:
    """Unit 1 of the hidden layer is constant, unit 2 is unread."""
    model = chain(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    dead(model[0], 1, bias=0.4)
    unread(model[2], 2)
    return model


def hidden_mask() -> dict[str, Tensor]:
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3] = False
    return {"0.weight": mask}


# Where masks come from


def test_masks_given_by_name() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    small, report = minimize(model, random(5, 4), masks=hidden_mask())
    assert kept(report, "0") == [0, 4]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    masked = copy.deepcopy(model)
    MaskSet(hidden_mask()).apply_(masked)
    torch.testing.assert_close(small(random(5, 4)), masked(random(5, 4)))


def test_masks_of_masked_layers() -> None:
    model = chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    conv = torch.ones_like(model[0].weight, dtype=torch.bool)
    conv[1] = False
    linear = torch.ones_like(model[3].weight, dtype=torch.bool)
    linear[:, 32:48] = False
    model[0] = MaskedConv2d.from_conv(model[0], conv)
    model[3] = MaskedLinear.from_linear(model[3], linear)
    model[0].bias.data[1] = -0.2
    model.eval()
    x = random(2, 2, 6, 6)
    small, report = minimize(model, x)
    assert kept(report, "0") == [0, 3]
    assert [type(layer) for layer in small][::3] == [nn.Conv2d, nn.Linear]  # type: ignore[attr-defined]
    torch.testing.assert_close(small(x), model(x))


def test_masks_of_torch_prune_before_and_after_a_forward_pass() -> None:
    model = small_net()
    torch_prune.custom_from_mask(model[0], "weight", hidden_mask()["0.weight"])
    expected = model(random(5, 4))
    small, report = minimize(model, random(5, 4))
    assert kept(report, "0") == [0, 4]
    assert not list(small[0]._forward_pre_hooks)  # type: ignore[index]
    torch.testing.assert_close(small(random(5, 4)), expected)
    assert hasattr(model[0], "weight_orig")


def test_a_mask_of_an_unknown_name() -> None:
    with pytest.raises(MaskMatchError, match=r"got no parameter for '7.weight'"):
        minimize(small_net(), random(5, 4), masks={"7.weight": torch.ones(1, dtype=torch.bool)})


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"must have the parameter's shape \(5, 4\)"):
        minimize(small_net(), random(5, 4), masks={"0.weight": torch.ones(4, 5, dtype=torch.bool)})


# Options and errors


def test_training_mode_is_an_error_that_says_why() -> None:
    with pytest.raises(
        ValueError,
        match=r"sapwood.minimize: model must be in evaluation mode, where BatchNorm and dropout",
    ):
        minimize(small_net().train(), random(5, 4))


def test_force_eval_restores_every_mode() -> None:
    model = small_net().train()
    model[1].eval()
    small, _ = minimize(model, random(5, 4), force_eval=True)
    assert [m.training for m in model] == [True, False, True]
    assert [m.training for m in small] == [True, False, True]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rules": "loose"}, r"rules must be one of exact, exact\+merge, got 'loose'"),
        ({"border": "none"}, "border must be one of table, ones, refuse, got 'none'"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"keep": ["9"]}, "keep must name modules of the model, got '9'"),
    ],
)
def test_unknown_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.minimize: {message}"):
        analyze(small_net(), random(5, 4), **option)


def test_data_dependent_control_flow_names_the_cause() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        return y if y.sum() > 0 else -y

    model = Net(forward, a=nn.Linear(4, 3)).double().eval()
    with pytest.raises(MinimizeError, match=r"sapwood.minimize: model must be traceable by torch"):
        minimize(model, random(5, 4))


def test_a_rewrite_that_is_not_exact_raises_and_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    distances = iter([0.0, 0.0, 1e-3, 0.0])
    monkeypatch.setattr(minimize_api, "difference", lambda *args: next(distances))
    with pytest.raises(MinimizeError, match="must compute the same to 1e-09"):
        minimize(model, random(5, 4), inplace=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_in_place() -> None:
    model = small_net()
    expected = model(random(5, 4))
    same, _ = minimize(model, random(5, 4), inplace=True)
    assert same is model
    assert model[0].out_features == 3
    torch.testing.assert_close(model(random(5, 4)), expected)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_forms_of_example_inputs(form: str) -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    model.double().eval()
    unread(model.b, 1)
    x = random(5, 4)
    example: Any = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[form]
    _, report = minimize(model, example)
    assert kept(report, "a") == [0, 2]


def test_frozen_parameters_stay_frozen() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    small, _ = minimize(model, random(5, 4))
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]


def test_without_verification_there_is_no_error_to_report() -> None:
    _, report = minimize(small_net(), random(5, 4), verify=False)
    assert report.max_error is None
    assert "not verified" in str(report)


# The report and the plan


def test_the_report() -> None:
    _, report = minimize(small_net(), random(5, 4))
    assert (report.parameters_before, report.parameters_after) == (43, 27)
    assert (report.macs_before, report.macs_after) == (5 * 35, 5 * 21)
    assert (report.bytes_before, report.bytes_after) == (8 * 43, 8 * 27)
    text = str(report)
    assert "43 -> 27  (1.59x smaller)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(report.to_dict()))["parameters_after"] == 27
    assert refusals(report) == ""


def test_the_plan_is_a_table() -> None:
    plan = analyze(small_net(), random(5, 4))
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "width", "kept", "constant", "stays", "because"]
    assert lines[1].split() == ["0", "5", "3", "1"]
    assert lines[2].split()[:4] == ["2", "3", "3", "0"]
    assert "output of the model" in lines[2]
    assert max(map(len, lines)) <= 80
    sigmoid = torch.sigmoid(torch.tensor(0.4, dtype=torch.float64)).item()
    assert plan.groups[0].constants == {1: pytest.approx(sigmoid)}


def test_a_plan_fits_one_model_only() -> None:
    model = small_net()
    plan = analyze(model, random(5, 4), masks=hidden_mask())
    assert plan.apply(model, hidden_mask())[0].out_features == 2  # type: ignore[index]
    with pytest.raises(ValueError, match=r"Plan.apply: model must have the masked weights"):
        plan.apply(model)
    with pytest.raises(ValueError, match=r"from_json: text must be a sapwood.minimize.plan/1"):
        Plan.from_json("{}")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_an_optimizer_moves_along(kind: str) -> None:
    """One more step of the minimized network is that of the masked one, on what it kept."""
    model = chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    unread(model[2], 2)
    model[2].weight.register_hook(lambda g: g.index_fill(1, torch.tensor([2]), 0.0))
    options = {"momentum": 0.9} if kind == "SGD" else {"weight_decay": 0.0}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **options)

    def step(network: nn.Module) -> None:
        optimizer.zero_grad()
        network(random(6, 4)).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(model)
    small, report = minimize(model, random(5, 4))
    reference = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    remap_optimizer(optimizer, report)
    step(small)
    whole = reference[0]
    optimizer = getattr(torch.optim, kind)(whole.parameters(), lr=0.05, **options)
    optimizer.load_state_dict(reference[1])
    step(whole)
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(small[0].weight, whole[0].weight[keep])  # type: ignore[index]
    torch.testing.assert_close(small[2].weight, whole[2].weight[:, keep])  # type: ignore[index]


def test_an_optimizer_of_another_network() -> None:
    _, report = minimize(small_net(), random(5, 4))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(RuntimeError, match=r"optimizer must hold parameters of the minimized"):
        remap_optimizer(other, report)


# Files


def test_a_file_of_another_model(tmp_path: Path) -> None:
    small, _ = minimize(small_net(), random(5, 4))
    save(small, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"model_fn must build the network that was minimized"):
        load(tmp_path / "a.safetensors", lambda: nn.Sequential(nn.Linear(4, 5)))


def test_files_that_are_no_minimized_networks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sapwood.minimize.load: path must exist"):
        load(tmp_path / "none.safetensors", small_net)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"path must be a safetensors file"):
        load(tmp_path / "text", small_net)
    content = safetensors.torch.save({"a": torch.zeros(1)}, metadata={"format": "other"})
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must hold a sapwood.minimized/1, got other"):
        load(tmp_path / "other", small_net)


def test_a_loaded_network_trains(tmp_path: Path) -> None:
    small, _ = minimize(small_net(), random(5, 4))
    save(small, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", small_net)
    again(random(5, 4)).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


# Promises


def test_a_promised_constant_folds_and_is_kept_in_report_and_file(tmp_path: Path) -> None:
    model = chain(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.data[2, :9] = 0.0
    x = random(5, 12)
    constants = {channel: 0.5 * channel for channel in range(9, 12)}
    for channel, value in constants.items():
        x[:, channel] = value
    model[0].weight.data[:, :6] = 0.0
    small, report = minimize(model, x, promises={"input": {"constant": constants}})
    assert kept(report, "0") == [0, 1, 3, 4, 5]
    assert small[0][1].in_features == 3  # type: ignore[index]
    y = random(7, 12)
    for channel, value in constants.items():
        y[:, channel] = value
    torch.testing.assert_close(small(y), model(y), rtol=1e-10, atol=1e-10)
    save(small, tmp_path / "a.safetensors", report=report)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["report"])
    assert stored["promises"] == {"input": {"constant": {"9": 4.5, "10": 5.0, "11": 5.5}}}


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ({"mask": {"constant": {0: 1.0}}}, r"promises must name arguments of the model \(input\)"),
        ({"input": {"sign": 1}}, r'promises must promise "constant" or "range", got \[.sign.\]'),
        ({"input": {}}, r'promises must promise "constant" or "range", got \[\]'),
        ({"input": {"constant": {4: 1.0}}}, r"promises must name channels of input below 4, got 4"),
        ({"input": {"constant": {0: 1.0}}}, r"promises must hold for the example"),
    ],
)
def test_promises_that_cannot_be_kept(promise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.minimize: {message}"):
        analyze(small_net(), random(5, 4), promises=promise)
