"""Random networks of supported layers: exact, never larger, finished after one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import minimize
from tests.minimize.planting import largest_difference, mask_randomly

WIDTHS = st.integers(2, 6)
KINDS = ["conv", "conv", "depthwise", "grouped", "bn", "gn", "norm", "act", "join"]
FUNCTIONS = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
}


class Graph(nn.Module):
    """A network that follows a list of steps over images; every step reads earlier results."""

    def __init__(self, steps: list[tuple[str, Any, list[int]]], layers: nn.ModuleList) -> None:
        super().__init__()
        self.steps, self.layers = steps, layers

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for (kind, option, sources), layer in zip(self.steps, self.layers, strict=True):
            inputs = [results[i] for i in sources]
            if kind == "add":
                results.append(inputs[0] + inputs[1])
            elif kind == "gate":
                results.append(inputs[0] * inputs[1])
            elif kind == "cat":
                results.append(torch.cat(inputs, 1))
            elif kind == "act":
                results.append(FUNCTIONS[option](inputs[0]))
            elif kind == "norm":
                y = layer(inputs[0].permute(0, 2, 3, 1))
                results.append(y.permute(0, 3, 1, 2))
            else:
                results.append(layer(inputs[0]))
        return results[-1]


class SideBySide(nn.Module):
    """Networks over the same images. A trace costs more than its nodes: four share one."""

    def __init__(self, graphs: list[Graph]) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(graphs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([graph(x) for graph in self.graphs], 1)


@st.composite
def graphs(draw: Any) -> Graph:
    """Convolutions of all kinds, norms, activations, sums, products, concatenations, pools."""
    steps: list[tuple[str, Any, list[int]]] = []
    layers: list[nn.Module] = []
    widths = [3]

    def emit(kind: str, option: Any, sources: list[int], layer: nn.Module, width: int) -> None:
        steps.append((kind, option, sources))
        layers.append(layer)
        widths.append(width)

    for _ in range(draw(st.integers(2, 7))):
        source = draw(st.integers(max(0, len(widths) - 3), len(widths) - 1))
        width = widths[source]
        kind = draw(st.sampled_from(KINDS))
        if kind == "conv":
            out, size = draw(WIDTHS), draw(st.sampled_from([1, 3, 5]))
            mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
            bias = draw(st.booleans())
            conv = nn.Conv2d(width, out, size, padding=size // 2, padding_mode=mode, bias=bias)
            emit("layer", None, [source], conv, out)
        elif kind == "depthwise":
            conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
            emit("layer", None, [source], conv, width)
        elif kind == "grouped" and width % 2 == 0:
            conv = nn.Conv2d(width, 4, 3, padding=1, groups=2)
            emit("layer", None, [source], conv, 4)
        elif kind == "bn":
            emit("layer", None, [source], nn.BatchNorm2d(width), width)
        elif kind == "gn" and width % 2 == 0:
            emit("layer", None, [source], nn.GroupNorm(2, width), width)
        elif kind == "norm":
            norm = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
            emit("norm", None, [source], norm(width, eps=1e-3), width)
        elif kind == "join":
            partners = [i for i, w in enumerate(widths) if w == width]
            other = draw(st.sampled_from(partners))
            join = draw(st.sampled_from(["add", "gate", "cat"]))
            emit(join, None, [source, other], nn.Identity(), width * (2 if join == "cat" else 1))
        else:
            emit("act", draw(st.sampled_from(sorted(FUNCTIONS))), [source], nn.Identity(), width)
    emit("layer", None, [len(widths) - 1], nn.Conv2d(widths[-1], 3, 3, padding=1), 3)
    return Graph(steps, nn.ModuleList(layers))


MASKS = (st.integers(0, 2**16), st.sampled_from([0.15, 0.4, 0.7]))
SETTINGS = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def check(model: nn.Module, seed: int, density: float, rules: str = "exact") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + drawn.abs() if name.endswith("var") else drawn * 0.7)
            if name.endswith("weight") and tensor.dim() == 1:
                tensor *= torch.rand(tensor.shape, generator=generator) < 0.7
    model.double().eval()
    mask_randomly(model, seed, density)
    if rules != "exact":
        repeat_units(model)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    small, report = minimize(model, x, rules=rules)
    other = torch.randn(3, 3, 5, 7, generator=generator, dtype=torch.float64)
    for inputs in (x * 3.0, other):
        assert largest_difference(model, small, inputs) <= 1e-9
    assert report.parameters_after <= report.parameters_before
    assert report.macs_after <= report.macs_before
    again, second = minimize(small, x, rules=rules)
    assert second.plan.edits == []
    assert torch.equal(again(other), small(other))


@torch.no_grad()
def repeat_units(model: nn.Module) -> None:
    """Makes the second unit of every dense convolution half the first."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    tensor[1] = 0.5 * tensor[0]


@given(graphs(), *MASKS)
@settings(SETTINGS, max_examples=5)
def test_some_random_graphs(model: Graph, seed: int, density: float) -> None:
    check(model, seed, density)


@given(graphs(), *MASKS)
@settings(SETTINGS, max_examples=5)
def test_some_random_graphs_with_merging(model: Graph, seed: int, density: float) -> None:
    check(model, seed, density, rules="exact+merge")


@pytest.mark.slow
@given(st.lists(graphs(), min_size=4, max_size=4), *MASKS)
@settings(SETTINGS, max_examples=15)
def test_sixty_random_graphs_with_merging(models: list[Graph], seed: int, density: float) -> None:
    check(SideBySide(models), seed, density, rules="exact+merge")


@pytest.mark.slow
@given(st.lists(graphs(), min_size=4, max_size=4), *MASKS)
@settings(SETTINGS, max_examples=50)
def test_two_hundred_random_graphs(models: list[Graph], seed: int, density: float) -> None:
    check(SideBySide(models), seed, density)
