"""Checks for ``rules="exact+merge"``: what holds for every network, merged or left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize import analyze, minimize
from tests.minimize.planting import (
    minimized,
    refusals,
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
