"""Ranges promised of the inputs: units that saturate on all of them are constants."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import InputSelect, Plan, analyze, minimize
from sapwood.minimize._analysis import Analysis, Options
from sapwood.minimize._facts import Bounds
from sapwood.minimize._promises import Promises
from sapwood.minimize._trace import Inputs, traced
from sapwood.minimize.rules import tensors_in
from tests.minimize.planting import Net, chain, kept, prepared, random

Ends = tuple[float, float]


class Recording(Analysis):
    """Keeps what is known of the outputs."""

    def _output(self, results: Any) -> None:
        self.results = list(tensors_in(results))
        super()._output(results)


def ranges(model: nn.Module, examples: dict[Ends, Tensor]) -> list[Bounds | None]:
    """The ranges of a model's output, for each range of its input with an example of it."""
    found = []
    with traced(model, Inputs.of(next(iter(examples.values())))) as trace, torch.no_grad():
        for ends, x in examples.items():
            promises = Promises.of({"input": {"range": ends}}, model, Inputs.of(x))
            analysis = Recording(model, trace, Options(promises=promises))
            analysis.run()
            found.append(analysis.results[0].bounds)
    return found


def uniform(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Units that go


def test_units_that_never_rise_above_zero() -> None:
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].weight.data[1] = -model[0].weight.data[1].abs()
    model[0].bias.data[1] = 0.0  # touches 0, where ReLU is 0
    model[0].weight.data[3] = -model[0].weight.data[3].abs()
    model[0].bias.data[3] = 0.01
    model[0].bias.data[[0, 2, 4]] = 0.5
    x = uniform(4, 6)
    small, report = minimize(model, x, promises={"input": {"range": (0, 1)}})
    assert kept(report, "0") == [0, 2, 3, 4]
    y = uniform(1000, 6, seed=4)
    torch.testing.assert_close(small(y), model(y), rtol=0, atol=1e-12)
    assert kept(minimize(model, x)[1], "0") == [0, 1, 2, 3, 4]
    signed = minimize(model, x, promises={"input": {"range": (-1, 1)}})[1]
    assert kept(signed, "0") == [0, 1, 2, 3, 4]
    positive = minimize(model, x, promises={"input": {"range": (0, math.inf)}})[1]
    assert kept(positive, "0") == [0, 2, 3, 4]


def test_an_upper_limit_folds_as_a_constant() -> None:
    model = chain(nn.Linear(6, 4), nn.ReLU6(), nn.Linear(4, 3))
    model[0].weight.data[2] = 0.1
    model[0].bias.data[2] = 7.0
    x = uniform(4, 6)
    small, report = minimize(model, x, promises={"input": {"range": (0, 1)}})
    assert kept(report, "0") == [0, 1, 3]
    expected = model[2].bias + 6.0 * model[2].weight[:, 2]
    torch.testing.assert_close(small[2].bias, expected)


def test_convolutions_of_images() -> None:
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    model = chain(*layers, nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data[1] = -model[0].weight.data[1].abs()
    model[0].bias.data[1] = 0.0
    model[1].weight.data[1] = 1.0
    model[1].bias.data[1] = -0.1
    model[1].running_mean[1] = 0.0
    model[4].weight.data[3] = -model[4].weight.data[3].abs()  # reads what ReLU gives
    model[4].bias.data[3] = -0.2
    x = uniform(2, 3, 10, 10)
    small, report = minimize(model, x, promises={"input": {"range": (0, 1)}})
    assert 1 not in kept(report, "0")
    assert 3 not in kept(report, "4")
    for size in (8, 15):
        y = uniform(3, 3, size, size + 2, seed=5)
        torch.testing.assert_close(small(y), model(y), rtol=0, atol=1e-12)


def test_a_second_pass_and_a_plan_keep_the_promise() -> None:
    model = chain(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.data[:, :15] = 0.0
    model[0].weight.data[2] = -model[0].weight.data[2].abs()
    model[0].bias.data[2] = -0.1
    x, promise = uniform(4, 20), {"input": {"range": (0, 1)}}
    plan = analyze(model, x, promises=promise)
    assert plan.promises == {"input": {"range": [0.0, 1.0]}}
    again = Plan.from_json(plan.to_json()).apply(model)
    small, _ = minimize(model, x, promises=promise)
    assert torch.equal(again(x), small(x))
    assert isinstance(small[0][0], InputSelect)
    small[0][1].weight.data[1] = -0.1  # a unit that died since, behind the selection
    small[0][1].bias.data[1] = -0.1
    assert 1 not in kept(minimize(small, x, promises=promise)[1], "0.1")
    report = minimize(model, x, promises={"input": {"range": (0, math.inf)}})[1]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["promises"] == {
        "input": {"range": [0.0, None]}
    }


def test_a_range_and_constants() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1] = torch.tensor([-1.0, -1.0, 2.0, -1.0])
    model[0].bias.data[1] = -0.5
    x = uniform(5, 4)
    x[:, 2] = 0.2
    promise = {"input": {"range": (0, 1), "constant": {2: 0.2}}}
    _, report = minimize(model, x, promises=promise)
    assert kept(report, "0") == [0, 2]
    assert report.plan.promises == {"input": {"constant": {"2": 0.2}, "range": [0.0, 1.0]}}


# Ranges


def test_a_linear_layer_reaches_its_range() -> None:
    model = chain(nn.Linear(6, 4))
    (found,) = ranges(model, {(-0.5, 2.0): uniform(2, 6)})
    assert found is not None
    corners = torch.tensor(list(itertools.product((-0.5, 2.0), repeat=6)), dtype=torch.float64)
    values = model(corners)
    torch.testing.assert_close(found.low[0], values.amin(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.high[0], values.amax(0), rtol=1e-9, atol=1e-9)
    assert (found.low[0] <= values.amin(0)).all()
    assert (found.high[0] >= values.amax(0)).all()


def test_open_ends_reach_only_what_reads_them() -> None:
    model = chain(nn.Linear(3, 4))
    model[0].weight.data = torch.tensor(
        [[1.0, 0, 0], [-1.0, -2.0, 0], [0, 0, 0], [1.0, -1.0, 0]], dtype=torch.float64
    )
    model[0].bias.data = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    (found,) = ranges(model, {(0.0, math.inf): uniform(2, 3)})
    assert found is not None
    assert found.high[0].tolist() == pytest.approx([math.inf, 0.5, 0.5, math.inf])
    assert found.low[0].tolist() == pytest.approx([0.5, -math.inf, 0.5, -math.inf])


def shift_and_scale(m: nn.Module, x: Tensor) -> Tensor:
    return (2.0 - (x - 0.3) / 0.25) * x + 1.0


OPERATIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "conv": lambda m, x: F.conv2d(x, m.grouped.weight, m.grouped.bias, padding=1, groups=2),
    "conv_stride": lambda m, x: F.conv2d(x, m.grouped.weight, stride=2, dilation=2, groups=2),
    "same": lambda m, x: F.conv2d(x, m.grouped.weight, padding="same", groups=2),
    "batch_norm": lambda m, x: m.norm(x),
    "tanh": lambda m, x: torch.tanh(x),
    "leaky": lambda m, x: F.leaky_relu(x - 0.5, 0.2),
    "clamp": lambda m, x: (x - 0.5).clamp(-0.4, 0.2),
    "max_pool": lambda m, x: F.max_pool2d(x - 0.5, 3, padding=1),
    "avg_pool": lambda m, x: F.avg_pool2d(x + 1.0, 3, padding=1),
    "avg_pool_inside": lambda m, x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean_all": lambda m, x: x.mean(),
    "amax": lambda m, x: x.amax(1, keepdim=True),
    "upsample": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "arithmetic": shift_and_scale,
    "difference": lambda m, x: x[:, :2] - x[:, 2:],
    "permute": lambda m, x: x.permute(0, 2, 3, 1).flatten(1) * m.vector,
    "split": lambda m, x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(2, 1))], 1),
    "stack": lambda m, x: torch.stack((x, 2 * x), 2),
    "linear": lambda m, x: m.linear(x.permute(0, 2, 3, 1)),
}


def draw(ends: Ends, seed: int) -> Tensor:
    """Half of the entries at the lower end."""
    x = ends[0] + (min(ends[1], 5.0) - ends[0]) * uniform(64, 4, 7, 7, seed=seed)
    return torch.where(uniform(64, 4, 7, 7, seed=seed + 1).round() > 0, x, ends[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_stay_within_their_ranges(name: str) -> None:
    layers = {
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "norm": nn.BatchNorm2d(4),
        "linear": nn.Linear(4, 3),
    }
    model = Net(OPERATIONS[name], **layers)
    model.register_buffer("vector", torch.linspace(-1, 1, 4 * 49))
    prepared(model)
    examples = {ends: draw(ends, 0) for ends in ((0.0, 1.0), (-0.7, 0.4), (0.2, math.inf))}
    for ends, found in zip(examples, ranges(model, examples), strict=True):
        inputs = [draw(ends, seed) for seed in range(1, 9, 2)]
        inputs += [torch.full_like(inputs[0], min(end, 5.0)) for end in ends]
        y = torch.stack([model(x) for x in inputs])
        assert found is not None
        assert (y >= found.low).all()
        assert (y <= found.high).all()
        if math.isfinite(ends[1]):
            width = (found.high - found.low).amax()
            assert width <= 40 * (y.amax() - y.amin())  # a bound, not a triviality


def test_what_has_no_rule_has_no_range() -> None:
    unit = (0.0, 1.0)
    softmax = prepared(Net(lambda m, x: torch.softmax(x, 1)))
    assert ranges(softmax, {unit: uniform(2, 4)}) == [None]
    reciprocal = prepared(Net(lambda m, x: 1.0 / x))
    assert ranges(reciprocal, {unit: 0.1 + 0.8 * uniform(2, 4)}) == [None]
    computed = prepared(Net(lambda m, x: F.linear(x, torch.sin(x))))
    assert ranges(computed, {unit: uniform(4, 4)}) == [None]


# Promises that are none


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((1, 0), r"promises must give the range of input, floating point, .* got \(1, 0\)"),
        ((0, 1, 2), r"promises must give the range of input"),
        ("wide", r"promises must give the range of input, .* got 'wide'"),
        ((0, math.nan), r"promises must give the range of input"),
        ((0, 0.1), r"promises must hold for the example, whose input leaves the range, got \(0"),
    ],
)
def test_ranges_that_are_refused(ends: Any, message: str) -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=f"sapwood.minimize: {message}"):
        analyze(model, uniform(5, 4), promises={"input": {"range": ends}})


def test_integers_have_no_range() -> None:
    model = chain(nn.Embedding(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="give the range of input, floating point"):
        analyze(model, torch.tensor([[0, 1]]), promises={"input": {"range": (0, 3)}})


def test_random_inputs_of_the_check_keep_the_promise() -> None:
    model = chain(nn.Linear(4, 3))
    for ends in ((0.0, 1.0), (-math.inf, -2.0), (3.0, math.inf), (-math.inf, math.inf), (2.0, 2.0)):
        inputs = Inputs.of(torch.full((100, 4), max(min(2.5, ends[1]), ends[0])).double())
        promises = Promises.of({"input": {"range": ends}}, model, inputs)
        (x,) = promises.kept(model, Inputs.of(random(100, 4))).tensors()
        assert ((x >= ends[0]) & (x <= ends[1])).all()
        assert ends[0] == ends[1] or len(x.unique()) > 300
