"""Exact selection: against a sort in NumPy, and by its properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.pruning import LayerPlan, MaskSet, _radix, select

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


@pytest.mark.skipif(not _radix.COMPILED, reason="not built")
def test_compiled_loops_check_their_arrays() -> None:
    assert _radix.COMPILED is not None
    bits, counts = np.zeros(9, np.int32), np.zeros(65536, np.int64)
    count, switch_off = _radix.COMPILED.count_digits, _radix.COMPILED.switch_off
    order = (False, False)
    with pytest.raises(ValueError, match="counts must have 65536 elements, got 9"):
        count(bits, None, None, *order, 16, 0, np.zeros(9, np.int64))
    with pytest.raises(ValueError, match="active must have 9 elements, got 8"):
        count(bits, np.ones(8, bool), None, *order, 16, 0, counts)
    with pytest.raises(ValueError, match="kept must have 9 elements, got 8"):
        count(bits, None, np.ones(8, bool), *order, 16, 0, counts)
    for shift in (-16, 8, 32):
        with pytest.raises(ValueError, match=f"shift must be that of a digit, got {shift}"):
            count(bits, None, None, *order, shift, 0, counts)
    with pytest.raises(ValueError, match="keep must have 9 elements, got 8"):
        switch_off(bits, None, None, *order, 0, 0, np.ones(8, bool))
    for copied in (bits[::2], bits.astype(np.int16), bits.tolist()):
        with pytest.raises(TypeError):
            count(copied, None, None, *order, 16, 0, counts)


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


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
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
