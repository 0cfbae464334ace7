"""Whole networks: the minimized one computes the same, is smaller, and survives its files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from sapwood.minimize import (
    BorderBias2d,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    MinimizeReport,
    Plan,
    RaggedAttention,
    load,
    minimize,
    save,
)
from tests.minimize.models import CASES
from tests.minimize.planting import kept, largest_difference, mask_randomly, silence


def silence_resnet(model: nn.Module) -> None:
    """A constant other than zero, which meets the zero padding of the blocks."""
    silence(model, 1, ["stem.0.weight", "block1.conv2.weight"], [])
    with torch.no_grad():
        model.get_parameter("stem.1.bias")[1] = 1.5
        model.get_buffer("stem.1.running_mean")[1] = 0.0


def silence_convnext(model: nn.Module) -> None:
    writers = [f"stages.0.{i}.project.{k}" for i in (0, 1) for k in ("weight", "bias")]
    writers += ["stem.0.weight", "stem.0.bias", "stem.1.norm.bias"]
    silence(model, 1, writers, ["stem.1.norm", "stages.1.0.norm"])
    for block in (0, 1):
        silence(model, 1, [], [f"stages.0.{block}.norm"])


def silence_vit(model: nn.Module) -> None:
    blocks = [f"blocks.{i}" for i in (0, 1)]
    writers = ["embed.weight", "embed.bias", "token", "positions"]
    for block in blocks:
        writers += [f"{block}.attention.out.weight", f"{block}.project.weight"]
    silence(model, 2, writers, [f"{b}.norm{n}" for b in blocks for n in (1, 2)] + ["norm"])
    with torch.no_grad():
        model.get_parameter("embed.bias")[2] = model.get_parameter("token")[0, 0, 2]


def silence_encoder(model: nn.Module) -> None:
    layers = [f"encoder.layers.{i}" for i in (0, 1)]
    writers = ["embed.weight"]
    for layer in layers:
        writers += [f"{layer}.self_attn.out_proj.weight", f"{layer}.linear2.weight"]
    silence(model, 2, writers, [f"{la}.norm{n}" for la in layers for n in (1, 2)] + ["norm"])


def silence_gpt(model: nn.Module) -> None:
    blocks = [f"blocks.{i}" for i in (0, 1)]
    writers = ["tokens.weight", "positions.weight"]
    for block in blocks:
        writers += [f"{block}.attention.o.weight", f"{block}.down.weight"]
    silence(model, 2, writers, [f"{b}.norm{n}" for b in blocks for n in (1, 2)] + ["norm"])


#: Network -> what makes one channel of its stream a constant, the group it is in, the channel.
STREAMS: dict[str, tuple[Callable[[nn.Module], None], str, int]] = {
    "any_size_resnet": (silence_resnet, "stem.0", 1),
    "convnext": (silence_convnext, "stem.0", 1),
    "vit": (silence_vit, "embed", 2),
    "encoder_vit": (silence_encoder, "embed", 2),
    "small_gpt": (silence_gpt, "tokens", 2),
}


@cache
def prepared(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, MinimizeReport]:
    """A masked network with a silent stream channel, its minimized form, and the report."""
    case = CASES[name]
    model = case.make(seed)
    mask_randomly(model, seed)
    if name in STREAMS:
        STREAMS[name][0](model)
    small, report = minimize(model, case.inputs(2))
    return model, small, report


@pytest.mark.parametrize("name", CASES)
def test_same_function_in_float64(name: str) -> None:
    model, small, report = prepared(name)
    for n in (1, 7):
        assert largest_difference(model, small, CASES[name].inputs(n)) <= 1e-9
    assert report.max_error is not None
    assert report.max_error <= 1e-9
    assert report.parameters_after < report.parameters_before
    assert report.bytes_after < report.bytes_before
    assert report.macs_after < report.macs_before


@pytest.mark.parametrize("name", ["vgg_bn", "any_size_resnet", "convnext", "vit", "small_gpt"])
def test_another_seed(name: str) -> None:
    case = CASES[name]
    model = case.make(1)
    mask_randomly(model, 1, density=0.25)
    small, report = minimize(model, case.inputs(2))
    assert largest_difference(model, small, case.inputs(5)) <= 1e-9
    assert report.parameters_after < report.parameters_before
    assert report.macs_after < report.macs_before


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.other_size])
def test_another_image_size(name: str) -> None:
    model, small, _ = prepared(name)
    other = CASES[name].other_size
    assert other is not None
    for n in (1, 7):
        assert largest_difference(model, small, other(n)) <= 1e-9


@pytest.mark.parametrize("name", [n for n in CASES if n != "small_gpt"])
def test_same_gradients_of_the_input(name: str) -> None:
    model, small, _ = prepared(name)
    gradients = []
    for network in (model, small):
        x = CASES[name].inputs(3).requires_grad_(True)
        network(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    a, b = gradients
    assert (a - b).abs().max() <= 1e-8 * a.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = CASES[name]
    model = prepared(name)[0]
    single = case.build()
    single.load_state_dict(model.state_dict())
    single.float().eval()
    x = case.inputs(7)
    x = x.float() if x.is_floating_point() else x
    small, _ = minimize(single, x)
    a, b = single(x), small(x)
    assert b.dtype == torch.float32
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_as_close_to_the_exact_network(name: str, dtype: torch.dtype) -> None:
    model, _, _ = prepared(name)
    case = CASES[name]
    narrow = case.build()
    narrow.load_state_dict(model.state_dict())
    narrow.to(dtype).eval()
    x = case.inputs(32)
    x = x.to(dtype) if x.is_floating_point() else x
    small, _ = minimize(narrow, x)
    exact = case.build()
    exact.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
    exact.double().eval()
    reference = exact(x.double() if x.is_floating_point() else x)
    errors = [(net(x).double() - reference).abs().max().item() for net in (narrow, small)]
    ulp = torch.finfo(dtype).eps * reference.abs().max().item()
    assert errors[1] <= 1.5 * errors[0] + ulp


@pytest.mark.parametrize("name", CASES)
def test_a_second_pass_changes_nothing(name: str) -> None:
    _, small, report = prepared(name)
    again, second = minimize(small, CASES[name].inputs(2))
    assert second.plan.edits == []
    assert second.parameters_after == second.parameters_before == report.parameters_after
    x = CASES[name].inputs(3)
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", CASES)
def test_the_plan_from_json_cuts_the_same(name: str) -> None:
    model, small, report = prepared(name)
    applied = Plan.from_json(report.plan.to_json()).apply(model)
    assert list(applied.state_dict()) == list(small.state_dict())
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, applied.state_dict()[key]), key
    x = CASES[name].inputs(3)
    assert torch.equal(applied(x), small(x))


@pytest.mark.parametrize("name", CASES)
def test_file(name: str, tmp_path: Path) -> None:
    _, small, report = prepared(name)
    save(small, tmp_path / "small.safetensors", report=report)
    again = load(tmp_path / "small.safetensors", CASES[name].build)
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    x = CASES[name].inputs(3)
    # The fused encoder of torch sums in another order in the network that was not used yet.
    torch.testing.assert_close(again(x), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["any_size_resnet", "convnext", "vit", "small_gpt"])
def test_torch_export(name: str) -> None:
    _, small, _ = prepared(name)
    x = CASES[name].inputs(2)
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", STREAMS)
def test_the_silent_stream_channel_is_gone(name: str) -> None:
    _, small, report = prepared(name)
    _, group, channel = STREAMS[name]
    assert channel not in kept(report, group)
    kinds = {type(module) for module in small.modules()}
    wanted = {
        "any_size_resnet": BorderBias2d,
        "convnext": CompensatedLayerNorm,
        "vit": CompensatedLayerNorm,
        "encoder_vit": CompensatedLayerNorm,
        "small_gpt": CompensatedRMSNorm,
    }
    assert wanted[name] in kinds


@pytest.mark.parametrize("name", ["vit", "encoder_vit", "small_gpt"])
def test_attention_is_rebuilt(name: str) -> None:
    _, small, report = prepared(name)
    found = [m for m in small.modules() if isinstance(m, RaggedAttention)]
    assert len(found) == 2
    assert not [r for r in report.refusals if "attention" in r.reason]


def test_predictions_agree_on_two_thousand_samples() -> None:
    model, small, _ = prepared("lenet300")
    x = CASES["lenet300"].inputs(2000)
    with torch.no_grad():
        a, b = model(x), small(x)
    top = a.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-5 * a.abs().max()
    assert clear.sum() > 1900
    assert torch.equal(a[clear].argmax(1), b[clear].argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_lenet", "any_size_convnet", "convnext"])
def test_torch_compile(name: str) -> None:
    _, small, _ = prepared(name)
    x = CASES[name].inputs(2)
    compiled = torch.compile(small, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-10, atol=1e-10)
