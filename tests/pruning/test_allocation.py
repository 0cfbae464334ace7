"""How a budget is divided among tensors: layer plans, Erdős-Rényi-kernel densities, rounding."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.pruning import LayerPlan, MaskMatchError, MaskSet, erk_densities, select
from sapwood.pruning.allocation import apportion


def dense_like(scores: dict[str, Tensor]) -> MaskSet:
    return MaskSet({name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()})


def test_layer_scope_has_equal_sparsities_and_an_exact_sum() -> None:
    scores = {f"l{n}": torch.rand(n) for n in (7, 13, 29, 101)}
    counts = select(scores, dense_like(scores), 0.7, scope="layer").counts()
    assert sum(n - kept for kept, n in counts.values()) == round(0.7 * 150)
    assert all(abs(n - kept - 0.7 * n) < 1 for kept, n in counts.values())


def test_layer_plan_gives_proportions_and_an_exact_sum() -> None:
    scores = {"a.weight": torch.rand(100), "b.weight": torch.rand(300), "c.weight": torch.rand(100)}
    plan = LayerPlan({"a": 0.0, "b": 0.8, "c.weight": 0.4})
    counts = select(scores, dense_like(scores), 0.56, scope=plan).counts()
    assert counts == {"a.weight": (100, 100), "b.weight": (60, 300), "c.weight": (60, 100)}
    halfway = select(scores, dense_like(scores), 0.28, scope=plan).counts()
    assert halfway == {"a.weight": (100, 100), "b.weight": (180, 300), "c.weight": (80, 100)}


@pytest.mark.parametrize("seed", range(20))
def test_layer_plan_like_copies_the_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(1, 300)), int(rng.integers(0, 300))) for _ in range(12)]
    densities = [*rng.random(10), 0.0, 1.0]
    masks = MaskSet(
        {
            f"l{i}": torch.from_numpy(rng.random(shape) < density)
            for i, (shape, density) in enumerate(zip(shapes, densities, strict=True))
        }
    )
    scores = {name: torch.from_numpy(rng.random(m.shape)) for name, m in masks.items()}
    control = select(
        *(scores, dense_like(scores), masks.sparsity()),
        scope=LayerPlan.like(masks),
        min_keep_per_layer=0,
    )
    assert control.counts() == masks.counts()
    assert control != masks


def test_layer_plan_caps_at_one_and_reports_what_it_cannot_reach() -> None:
    shapes = {"a": (100,), "b": (100,)}
    plan = LayerPlan({"a": 0.2, "b": 0.8}).normalized(shapes, 0.7)
    assert plan == pytest.approx({"a": 0.4, "b": 1.0})
    with pytest.raises(ValueError, match=r"normalized: sparsity must be at most 0\.5"):
        LayerPlan({"a": 0.0, "b": 0.8}).normalized(shapes, 0.7)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"a": 0.5}, "must cover every tensor, got no key for 'b.weight'"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, "every key must match a tensor, got no tensor for 'c'"),
    ],
)
def test_layer_plan_is_strict(plan: dict[str, float], text: str) -> None:
    with pytest.raises(MaskMatchError, match=text):
        LayerPlan(plan).resolve(["a.weight", "b.weight"])


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_layer_plan_checks_its_values(value: float) -> None:
    with pytest.raises(ValueError, match=r"the sparsity of 'a' must be in \[0, 1\]"):
        LayerPlan({"a": value})


def test_layer_plan_file(tmp_path: Path) -> None:
    plan = LayerPlan({"a": 0.25, "b": 0.5})
    plan.save(tmp_path / "plan.json")
    assert LayerPlan.load(tmp_path / "plan.json") == plan
    for content in ("", "[]", '{"format": "other"}', '{"format": "sapwood.layer_plan/1"}'):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(ValueError, match=r"must be a plan of sapwood\.layer_plan/1"):
            LayerPlan.load(tmp_path / "plan.json")


SATURATING = {
    "conv1": (16, 3, 3, 3),
    "conv2": (256, 256, 3, 3),
    "fc1": (512, 512),
    "head": (10, 64),
    "tail": (10, 16),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999])
def test_erk_meets_its_budget(sparsity: float) -> None:
    densities = erk_densities(SATURATING, sparsity)
    sizes = {name: math.prod(shape) for name, shape in SATURATING.items()}
    kept = sum(densities[name] * size for name, size in sizes.items())
    assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()), rel=1e-9)
    assert all(0 <= density <= 1 for density in densities.values())


def test_erk_fixes_saturated_layers_and_solves_again() -> None:
    densities = erk_densities(SATURATING, 0.8)
    assert [name for name, density in densities.items() if density == 1.0] == [
        "conv1",
        "head",
        "tail",
    ]
    ratio = {n: sum(s) / math.prod(s) for n, s in SATURATING.items()}
    eps = {densities[name] / ratio[name] for name in ("conv2", "fc1")}
    assert max(eps) == pytest.approx(min(eps))


def test_erk_scope_is_exact_after_rounding() -> None:
    scores = {name: torch.rand(shape) for name, shape in SATURATING.items()}
    counts = select(scores, dense_like(scores), 0.8, scope="erk").counts()
    densities = erk_densities(SATURATING, 0.8)
    total = sum(n for _, n in counts.values())
    assert sum(n - kept for kept, n in counts.values()) == round(0.8 * total)
    assert all(abs(kept - densities[name] * n) <= 1 for name, (kept, n) in counts.items())


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.floats(0, 50), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6
    ),
    share=st.floats(0, 1),
)
def test_apportion_is_exact_within_bounds(
    layers: list[tuple[float, int, int]], share: float
) -> None:
    floors = [min(a, b) for _, a, b in layers]
    caps = [max(a, b) if ideal else min(a, b) for ideal, a, b in layers]
    total = sum(floors) + round(share * (sum(caps) - sum(floors)))
    counts = apportion([ideal for ideal, _, _ in layers], total, floors, caps)
    assert sum(counts) == total
    assert all(f <= c <= cap for f, c, cap in zip(floors, counts, caps, strict=True))
