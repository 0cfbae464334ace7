"""Release: how large the noise is, what it may cost, what stays zero, and that it is repeatable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import release
from tests.minimize.models import CASES


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))


def sparse_linear(share: float = 0.5) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(200, 100)
    layer.weight.data[torch.rand(100, 200) < share] = 0.0
    return layer


def batch() -> tuple[Tensor, Tensor]:
    return 2.0 * seeded(256, 200), labels(256, 100)


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("tau", [0.02, 0.2])
def test_the_output_changes_by_tau(noise: str, tau: float) -> None:
    layer, (x, y) = sparse_linear(), batch()
    before = F.linear(x, layer.weight).detach()
    report = release(layer, (x, y), tau=tau, delta=10.0, noise=noise)
    change = F.linear(x, layer.weight).detach() - before
    ratio = float(change.square().mean().sqrt() / before.square().mean().sqrt())
    assert report.factor == 1.0
    assert abs(ratio / tau - 1) < 0.05


def test_a_convolution_changes_by_about_tau() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 32, 3)
    conv.weight.data[torch.rand_like(conv.weight) < 0.7] = 0.0
    x = seeded(16, 8, 12, 12)
    before = F.conv2d(x, conv.weight).detach()
    release(conv, (x, torch.zeros(16)), lambda output, y: output.square().mean(), delta=10.0)
    change = F.conv2d(x, conv.weight).detach() - before
    ratio = float(change.square().mean().sqrt() / before.square().mean().sqrt())
    assert abs(ratio / 0.02 - 1) < 0.05


def test_signs_have_one_size() -> None:
    layer = sparse_linear()
    zeros = layer.weight == 0
    report = release(layer, batch(), noise="rademacher", delta=10.0)
    sizes = layer.weight[zeros].detach().abs()
    torch.testing.assert_close(sizes, torch.full_like(sizes, report.tensors[0].scale))


def test_norm_noise_goes_by_the_weights() -> None:
    layer = sparse_linear()
    rest = layer.weight[layer.weight != 0].detach()
    report = release(layer, batch(), noise="norm", delta=10.0)
    assert report.tensors[0].scale == pytest.approx(0.02 * float(rest.square().mean().sqrt()))


def test_non_zeros_biases_and_norms_stay() -> None:
    model = CASES["vgg_bn"].make(dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data[::2] = 0.0
    before = copy.deepcopy(model.state_dict())
    x = CASES["vgg_bn"].inputs(32).float()
    report = release(model, (x, labels(32, 10)))
    released = {tensor.name for tensor in report.tensors}
    for name, tensor in model.state_dict().items():
        rest = before[name] != 0 if name in released else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[rest], before[name][rest]), name
    assert report.released == sum(
        int((before[name] == 0).sum() - (model.state_dict()[name] == 0).sum()) for name in released
    )
    assert report.released > 0


@pytest.mark.parametrize("delta", [0.0, 0.001, 0.01])
@pytest.mark.parametrize("name", ["vgg_bn", "convnext", "vit", "mixer", "any_size_resnet"])
def test_the_loss_rises_by_at_most_delta(name: str, delta: float) -> None:
    model = CASES[name].make(dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[:, ::2] = 0.0
    x = CASES[name].inputs(16).float()
    y = model(x).argmax(1)  # a trained network's labels: noise can only hurt
    before = F.cross_entropy(model(x), y).item()
    report = release(model, (x, y), tau=1.0, delta=delta)
    after = F.cross_entropy(model(x), y).item()
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(after, rel=1e-5)
    assert after <= before * (1 + delta) * (1 + 1e-6)


def test_when_no_noise_is_small_enough_the_zeros_return() -> None:
    layer = sparse_linear()
    before = layer.weight.detach().clone()

    def any_change_is_bad(output: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(1.0 if torch.equal(layer.weight, before) else 2.0)

    report = release(layer, batch(), any_change_is_bad)
    assert torch.equal(layer.weight, before)
    assert (report.factor, report.released, report.rise) == (0.0, 0, 0.0)


def test_what_is_left_out_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 3)
    )
    for index in (0, 3):
        model[index].weight.data[0] = 0.0
    model[1].weight.data.zero_()
    report = release(model, (seeded(8, 4, 3, 3), labels(8, 3)))
    reasons = {tensor.name: tensor.reason for tensor in report.tensors}
    assert reasons["0.weight"] == "a grouped or depthwise convolution"
    assert reasons["1.weight"] == "no output to go by"
    assert "0 of 16 zeros, no output to go by" in str(report)
    dense = nn.Linear(4, 3)
    assert release(dense, (seeded(8, 4), labels(8, 3))).tensors[0].reason == "no zeros"
    dense.weight.data[:, 0] = 0.0
    x = seeded(8, 4)
    x[:, 0] = 0.0
    assert release(dense, (x, labels(8, 3))).tensors[0].reason == "no input where the zeros are"
    dense.weight.data.zero_()
    report = release(dense, (x, labels(8, 3)), noise="norm")
    assert report.tensors[0].reason == "no non-zeros to go by"


def test_it_is_repeatable_and_touches_no_random_state() -> None:
    first, second, other = (sparse_linear() for _ in range(3))
    state = torch.get_rng_state()
    release(first, batch(), seed=3)
    release(second, batch(), seed=3)
    release(other, batch(), seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_modes_and_running_statistics_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model[0].weight.data[:, 0] = 0.0
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    release(model, (seeded(32, 6), labels(32, 3)))
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, before)


def test_no_denormals_are_left() -> None:
    layer = sparse_linear()
    zeros = layer.weight == 0
    layer.weight.data *= 1e-35
    report = release(layer, batch(), lambda output, y: output.sum() * 0.0 + 1.0)
    assert 0 < report.released < int(zeros.sum())
    sizes = layer.weight[zeros].detach().abs()
    assert not ((sizes > 0) & (sizes < torch.finfo(torch.float32).tiny)).any()


def test_the_report_is_plain_data() -> None:
    report = release(sparse_linear(), batch())
    data = report.to_dict()
    assert data["released"] == report.released > 0
    assert data["tensors"][0]["name"] == "weight"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 0.0}, "tau must be finite and positive, got 0.0"),
        ({"tau": torch.inf}, "tau must be finite and positive, got inf"),
        ({"delta": -0.1}, "delta must be finite and not negative, got -0.1"),
        ({"noise": "pink"}, "noise must be one of normal, rademacher, norm, got 'pink'"),
        (
            {"loss_fn": lambda o, y: o.sum() * torch.nan},
            "calibration_batch must have a finite loss",
        ),
    ],
)
def test_refusals(kwargs: dict[str, Any], message: str) -> None:
    layer = sparse_linear()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=f"sapwood.minimize.release: {message}"):
        release(layer, batch(), **kwargs)
    assert torch.equal(layer.weight, before)
