"""Exact selection: against a sort in NumPy, and by its properties."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.pruning import LayerPlan, MaskMatchError, MaskSet, _radix, erk_densities, select
from sapwood.pruning.allocation import apportion

Scores = dict[str, Tensor]

#: The compiled loops and their oracle in torch.
LOOPS = [
    pytest.param("compiled", marks=pytest.mark.skipif(not _radix.COMPILED, reason="not built")),
    "torch",
]


@pytest.fixture(params=LOOPS)
def _loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(_radix, "COMPILED", None)


def dense_like(scores: Scores) -> MaskSet:
    return MaskSet({name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()})


def oracle(
    scores: Scores,
    masks: MaskSet,
    off: int,
    min_keep: int,
    monotone: bool,
    *,
    absolute: bool = False,
    min_keep_per_unit: int = 0,
) -> list[Tensor]:
    """Sorts everything; elements that a row or a tensor must keep are taken out of the order."""
    values, layer, unit, inactive = [], [], [], []
    for index, (name, score) in enumerate(scores.items()):
        value = score.double().numpy().ravel() + 0.0  # -0.0 becomes 0.0
        values.append(np.abs(value) if absolute else value)
        layer.append(np.full(score.numel(), index))
        unit.append(np.arange(score.numel()) // max(1, math.prod(score.shape[1:])))
        mask = masks[name].numpy().ravel()
        inactive.append(~mask if monotone else np.zeros_like(mask))
    value, owner, row = map(np.concatenate, (values, layer, unit))
    gone = np.concatenate(inactive)
    off = max(off, int(gone.sum()))
    order = np.lexsort((np.arange(len(value)), owner, value, ~gone))
    protected: set[int] = set()
    for index, score in enumerate(scores.values()):
        mine = [i for i in order if owner[i] == index and not gone[i]]
        kept: list[int] = []
        for r in range(score.shape[0]) if min_keep_per_unit else ():
            kept += [i for i in mine if row[i] == r][-min_keep_per_unit:]
        others = [i for i in mine if i not in kept]
        missing = min(len(others), max(0, min_keep - len(kept)))
        protected |= {*kept, *others[len(others) - missing :]}
    victims = [i for i in order if i not in protected][:off]
    if len(victims) < off:
        raise ValueError("unreachable")
    keep = np.ones(len(value), dtype=bool)
    keep[victims] = False
    sizes = [score.numel() for score in scores.values()]
    parts = np.split(keep, np.cumsum(sizes)[:-1])
    return [torch.from_numpy(k).view(s.shape) for k, s in zip(parts, scores.values(), strict=True)]


def special_scores(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    if kind == "ties":
        return rng.integers(0, 4, size).astype(np.float64)
    if kind == "signed":
        return rng.normal(size=size)
    if kind == "zeros":
        return rng.choice([0.0, -0.0, 1.0, -1.0], size)
    if kind == "denormal":
        return rng.integers(-5, 6, size) * 1e-45
    if kind == "infinite":
        return rng.choice([math.inf, -math.inf, 0.5, 3e38], size)
    return np.abs(rng.normal(size=size))


KINDS = ("ties", "signed", "zeros", "denormal", "infinite", "magnitude")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(kind, dtype, sparsity, seed, id=f"{kind}-{dtype}-{sparsity}-{seed}".lower())
    for seed, (kind, dtype, sparsity) in enumerate(
        itertools.product(KINDS, DTYPES, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.97, 0.999))
    )
]


LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


def laid_out(score: Tensor, layout: str) -> Tensor:
    """A matrix in another memory layout; the same values but for ``expanded``."""
    if layout == "transposed":
        return score.t().contiguous().t()
    if layout == "strided":
        return torch.stack((score, -score), dim=-1)[..., 0]
    if layout == "expanded":
        return score[:1].expand(score.shape)
    return score


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize(("kind", "dtype", "sparsity", "seed"), CASES)
def test_equals_a_sort(kind: str, dtype: torch.dtype, sparsity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(1, 40)), int(rng.integers(0, 9))) for _ in range(3)] + [(1, 1)]
    scores = {
        f"layer{i}": laid_out(
            torch.from_numpy(special_scores(kind, rng, math.prod(shape))).reshape(shape).to(dtype),
            str(rng.choice(LAYOUTS)),
        )
        for i, shape in enumerate(shapes)
    }
    total = sum(score.numel() for score in scores.values())
    monotone, absolute = bool(rng.integers(0, 2)), bool(rng.integers(0, 2))
    masks = dense_like(scores)
    if monotone:
        present = {n: torch.from_numpy(rng.random(s.shape) > 0.3) for n, s in scores.items()}
        masks = MaskSet(present)
    min_keep, per_unit = int(rng.integers(0, 4)), int(rng.integers(0, 3))
    try:
        expected = oracle(
            *(scores, masks, round(sparsity * total), min_keep, monotone),
            absolute=absolute,
            min_keep_per_unit=per_unit,
        )
    except ValueError:
        min_keep = per_unit = 0
        expected = oracle(*(scores, masks, round(sparsity * total), 0, monotone), absolute=absolute)
    chosen = select(
        *(scores, masks, sparsity),
        monotone=monotone,
        absolute=absolute,
        min_keep_per_layer=min_keep,
        min_keep_per_unit=per_unit,
    )
    for name, mask in zip(scores, expected, strict=True):
        assert torch.equal(chosen[name], mask), name


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_unit", [0, 2])
def test_chunks_join_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, layout: str, per_unit: int
) -> None:
    scores = {
        "a": laid_out(torch.randint(-3, 3, (10, 17)).float(), layout),
        "b": laid_out(torch.randint(-3, 3, (5, 91)).float(), layout),
    }
    masks = MaskSet({name: torch.rand(s.shape) > 0.1 for name, s in scores.items()})

    def all_steps() -> list[MaskSet]:
        options = {"min_keep_per_layer": 0, "min_keep_per_unit": per_unit}
        return [select(scores, masks, s / 8, **options) for s in range(8)]  # type: ignore[arg-type]

    whole = all_steps()
    monkeypatch.setattr(_radix, "CHUNK", 33)
    assert whole == all_steps()


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize("ties", [1, 10, 2_000_000])
def test_large_groups_of_ties_are_split_exactly(ties: int) -> None:
    """Of equal scores the first ones go, over several chunks and tensors."""
    sizes = (1_300_000, 7, 900_000)
    equal = torch.ones(sum(sizes), dtype=torch.bool)
    equal[torch.randperm(len(equal))[: len(equal) - ties]] = False
    whole = torch.where(equal, 0.5, torch.where(torch.rand(len(equal)) < 0.5, 0.25, 0.75))
    scores = {f"l{i}": part for i, part in enumerate(whole.split(sizes))}
    off = int((whole == 0.25).sum()) + ties // 3
    chosen = select(scores, dense_like(scores), off / len(whole), min_keep_per_layer=0)
    expected = whole > 0.25
    expected[equal.nonzero().flatten()[: ties // 3]] = False
    assert torch.equal(torch.cat([chosen[name] for name in scores]), expected)


@pytest.mark.usefixtures("_loops")
def test_absolute_equals_the_absolute_scores_and_leaves_the_scores_alone() -> None:
    scores = {"w": torch.randn(50, 30), "h": torch.randn(20, 7).bfloat16()}
    before = {name: score.clone() for name, score in scores.items()}
    masks = MaskSet({name: torch.rand(s.shape) > 0.2 for name, s in scores.items()})
    chosen = select(scores, masks, 0.6, absolute=True)
    assert chosen == select({n: s.abs() for n, s in scores.items()}, masks, 0.6)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_parameters_are_scores_too() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, -3.0], [2.0, -0.5]]))
    chosen = select({"w": weight}, dense_like({"w": weight}), 0.5, absolute=True)["w"]
    assert chosen.tolist() == [[False, True], [True, False]]
    assert not chosen.requires_grad


@pytest.mark.usefixtures("_loops")
def test_infinite_scores_are_ranked() -> None:
    score = torch.tensor([math.inf, -math.inf, 3.4e38, -math.inf, math.inf, -3.4e38])
    order = [1, 3, 5, 2, 0, 4]
    for off in range(6):
        chosen = select({"w": score}, dense_like({"w": score}), off / 6)["w"]
        assert (~chosen).nonzero().flatten().tolist() == sorted(order[:off])


def test_every_row_keeps_its_best() -> None:
    scores = {"w": torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [4.0, 4.0, 4.0]])}
    chosen = select(scores, dense_like(scores), 6 / 9, min_keep_per_unit=1)["w"]
    assert chosen.tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.666666 with these minima"):
        select(scores, dense_like(scores), 7 / 9, min_keep_per_unit=1)


@pytest.mark.parametrize("scope", ["layer", "erk", LayerPlan({"a": 0.9, "b": 0.2})])
def test_every_row_keeps_its_best_under_every_scope(scope: str | LayerPlan) -> None:
    scores = {"a": torch.rand(30, 10) * torch.rand(30, 1) ** 8, "b": torch.rand(10, 40)}
    chosen = select(scores, dense_like(scores), 0.6, scope=scope, min_keep_per_unit=2)
    assert all(int(mask.sum(1).min()) >= 2 for mask in chosen.values())
    assert sum(n - kept for kept, n in chosen.counts().values()) == round(0.6 * 700)


@pytest.mark.usefixtures("_loops")
def test_mixed_precisions_are_ranked_together() -> None:
    scores = {"narrow": torch.tensor([0.5, 0.25]), "wide": torch.tensor([0.3, 0.1]).double()}
    chosen = select(scores, dense_like(scores), 0.5, min_keep_per_layer=0)
    assert chosen["narrow"].tolist() == [True, False]
    assert chosen["wide"].tolist() == [True, False]


@pytest.mark.usefixtures("_loops")
def test_double_scores_are_not_rounded() -> None:
    base = torch.tensor([1.0, 1.0 + 1e-15, 1.0 - 1e-15, 1.0 + 2e-15], dtype=torch.float64)
    chosen = select({"w": base}, dense_like({"w": base}), 0.5)
    assert chosen["w"].tolist() == [False, True, False, True]


def test_memory_layout_does_not_matter() -> None:
    score = torch.randint(0, 5, (4, 6, 3, 3)).float()
    last = {"w": score.to(memory_format=torch.channels_last)}
    masks = dense_like({"w": score})
    assert select(last, masks, 0.6) == select({"w": score}, masks, 0.6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    steps=st.lists(st.floats(0, 0.98), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_monotone_masks_nest_and_stay_exact(
    sizes: list[int], steps: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = MaskSet({f"l{i}": torch.ones(n, dtype=torch.bool) for i, n in enumerate(sizes)})
    off = 0
    for sparsity in steps:
        scores = {
            n: torch.from_numpy(rng.integers(0, 9, m.shape)).float() for n, m in masks.items()
        }
        after = select(scores, masks, sparsity, min_keep_per_layer=0)
        off = max(off, round(sparsity * sum(sizes)))
        assert sum(n - kept for kept, n in after.counts().values()) == off
        assert (after & masks) == after
        masks = after


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("min_keep", [1, 5])
def test_min_keep_holds_and_the_total_stays_exact(scope: str, min_keep: int) -> None:
    scores = {
        "tiny": torch.full((6,), 1e-6),
        "big": torch.rand(400) + 1.0,
        "small": torch.rand(20) * 1e-3,
    }
    chosen = select(
        scores, dense_like(scores), 0.9, scope=scope, min_keep_per_layer=min_keep
    ).counts()
    assert all(kept >= min_keep for kept, _ in chosen.values())
    assert sum(n - kept for kept, n in chosen.values()) == round(0.9 * 426)


def test_min_keep_never_revives() -> None:
    masks = MaskSet({"a": torch.zeros(4, dtype=torch.bool), "b": torch.ones(6, dtype=torch.bool)})
    chosen = select({"a": torch.ones(4), "b": torch.arange(6.0)}, masks, 0.9)
    assert chosen["a"].sum() == 0
    assert chosen["b"].tolist() == [False] * 5 + [True]


def test_unreachable_sparsity_names_the_largest() -> None:
    scores = {"a": torch.rand(2), "b": torch.rand(2)}
    with pytest.raises(ValueError, match=r"select: sparsity must be at most 0\.5 .*, got 0\.9"):
        select(scores, dense_like(scores), 0.9)


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


@settings(max_examples=200, deadline=None)
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


@pytest.mark.parametrize("sparsity", [math.nan, math.inf, -math.inf, -0.1, 1.0, 1.5])
def test_sparsity_must_be_finite_and_below_one(sparsity: float) -> None:
    scores = {"w": torch.rand(4)}
    with pytest.raises(ValueError, match=r"select: sparsity must be finite and in \[0, 1\), got"):
        select(scores, dense_like(scores), sparsity)


def test_nan_scores_are_named_and_counted() -> None:
    scores = {"ok": torch.rand(4), "bad": torch.tensor([1.0, math.nan, math.nan])}
    with pytest.raises(ValueError, match="score bad must hold numbers, got 2 NaN values"):
        select(scores, dense_like(scores), 0.5)


@pytest.mark.parametrize(
    ("scores", "kwargs", "error", "text"),
    [
        ({"x": torch.rand(4)}, {}, ValueError, "scores must name the masks, got a difference"),
        ({"w": torch.rand(5)}, {}, ValueError, r"must have the mask's shape \(4,\), got \(5,\)"),
        ({"w": torch.ones(4).long()}, {}, TypeError, "must be a floating tensor, got torch.int64"),
        ({"w": torch.rand(4)}, {"scope": "block"}, ValueError, "scope must be one of"),
        ({"w": torch.rand(4)}, {"min_keep_per_layer": -1}, ValueError, "must be at least 0"),
        ({"w": torch.rand(4)}, {"min_keep_per_unit": 1.5}, ValueError, "per_unit must be at least"),
        ({"w": torch.rand(4)}, {"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
    ],
    ids=["names", "shape", "dtype", "scope", "min-keep", "min-keep-per-unit", "sparsity-type"],
)
def test_bad_arguments(
    scores: Scores, kwargs: dict[str, object], error: type[Exception], text: str
) -> None:
    masks = MaskSet({"w": torch.ones(4, dtype=torch.bool)})
    arguments = {"sparsity": 0.5, **kwargs}
    with pytest.raises(error, match=text):
        select(scores, masks, **arguments)  # type: ignore[arg-type]


def test_faster_than_selection_and_sorting_in_torch() -> None:
    whole = torch.randn(10**7).abs()
    scores = {f"l{i}": part for i, part in enumerate(whole.chunk(8))}
    masks = dense_like(scores)
    ours, kth = math.inf, math.inf
    for _ in range(3):
        started = time.perf_counter()
        select(scores, masks, 0.9)
        ours = min(ours, time.perf_counter() - started)
        started = time.perf_counter()
        torch.kthvalue(whole, 9 * 10**6)
        kth = min(kth, time.perf_counter() - started)
    started = time.perf_counter()
    torch.sort(whole)
    sort = time.perf_counter() - started
    assert ours <= 0.7 * kth, f"{ours:.3f} s against kthvalue's {kth:.3f} s"
    assert ours <= 0.15 * sort, f"{ours:.3f} s against sort's {sort:.3f} s"
