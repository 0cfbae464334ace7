"""Selection of n of every m inputs and of whole rows, against loops in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.pruning import LayerPlan, MaskSet, _radix, select
from sapwood.pruning.structured import misfits

Scores = dict[str, Tensor]


def dense_like(scores: Scores) -> MaskSet:
    return MaskSet({name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()})


def random_masks(scores: Scores, density: float = 0.7) -> MaskSet:
    return MaskSet({name: torch.rand(s.shape) < density for name, s in scores.items()})


def runs_oracle(score: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    """Sorts every run of m input channels by (active, score, channel) and keeps the last n."""
    values, active = score.double().numpy(), mask.numpy()
    keep = active.copy()
    others = [range(size) for axis, size in enumerate(values.shape) if axis != 1]
    for out, *kernel in itertools.product(*others):
        for start in range(0, values.shape[1], m):
            run = [(out, channel, *kernel) for channel in range(start, start + m)]
            run.sort(key=lambda at: (active[at], values[at], at[1]))
            for at in run[: m - n]:
                keep[at] = False
    return torch.from_numpy(keep)


@pytest.mark.parametrize(
    "shape", [(5, 12), (1, 12), (0, 12), (3, 24, 2), (4, 12, 3, 3), (2, 12, 1, 2, 2)], ids=str
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 3), (5, 6), (3, 12)])
@pytest.mark.parametrize("monotone", [False, True])
def test_runs_equal_a_sort(shape: tuple[int, ...], n: int, m: int, monotone: bool) -> None:
    for dtype, levels in ((torch.float32, 4), (torch.float64, 1000), (torch.bfloat16, 20)):
        scores = {"w": torch.randint(-levels, levels, shape).to(dtype)}
        masks = random_masks(scores) if monotone else dense_like(scores)
        chosen = select(scores, masks, 1 - n / m, granularity="n:m", n_m=(n, m))["w"]
        assert torch.equal(chosen, runs_oracle(scores["w"], masks["w"], n, m))


def test_runs_of_a_convolution_follow_the_input_channels() -> None:
    score = torch.zeros(1, 4, 2, 2)
    score[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    score[0, :, 1, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen = select({"w": score}, dense_like({"w": score}), 0.5, granularity="n:m", n_m=(2, 4))["w"]
    assert chosen[0, :, 0, 0].tolist() == [True, True, False, False]
    assert chosen[0, :, 1, 1].tolist() == [False, False, True, True]
    assert chosen[0, :, 0, 1].tolist() == [False, False, True, True]  # of ties the first ones go


def test_runs_ignore_layout_chunks_and_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randint(-3, 4, (9, 8, 3, 3)).float()
    masks = random_masks({"w": score})
    options = {"granularity": "n:m", "n_m": (2, 4), "absolute": True}
    expected = runs_oracle(score.abs(), masks["w"], 2, 4)
    last = score.to(memory_format=torch.channels_last)
    monkeypatch.setattr(_radix, "CHUNK", 150)
    for weight, scope in itertools.product((score, last), ("global", "layer")):
        chosen = select({"w": weight}, masks, 0.5, scope=scope, **options)  # type: ignore[arg-type]
        assert torch.equal(chosen["w"], expected)


def test_tensors_that_do_not_fit_are_refused_or_left_alone() -> None:
    scores = {
        "stem.weight": torch.rand(8, 3, 3, 3),
        "block.weight": torch.rand(8, 8, 3, 3),
        "bias": torch.rand(8),
        "head.weight": torch.rand(10, 16),
    }
    masks = dense_like(scores)
    options = {"granularity": "n:m", "n_m": (2, 4)}
    text = r"the inputs of stem\.weight, .*, must divide by m = 4, got shape \(8, 3, 3, 3\)"
    with pytest.raises(ValueError, match=text):
        select(scores, masks, 0.5, **options)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"stem\.weight, bias do not divide by 4") as caught:
        chosen = select(scores, masks, 0.5, on_misfit="skip", **options)  # type: ignore[arg-type]
    assert [w.filename for w in caught] == [__file__]
    assert misfits({name: s.shape for name, s in scores.items()}, 4) == ["stem.weight", "bias"]
    assert chosen.counts() == {
        "stem.weight": (216, 216),
        "block.weight": (288, 576),
        "bias": (8, 8),
        "head.weight": (80, 160),
    }


def rows_oracle(scores: Scores, masks: MaskSet, target: int, min_keep: int) -> list[Tensor]:
    """Switches rows off one by one in the order (norm, tensor, row), then takes the best moment."""
    rows = []
    for t, (name, score) in enumerate(scores.items()):
        active = masks[name].reshape(len(score), -1).numpy()
        values = score.double().reshape(len(score), -1).numpy()
        mine = [
            (math.fsum(float(v) ** 2 for v in values[r][active[r]]), t, r, int(active[r].sum()))
            for r in range(len(score))
        ]
        kept, bound = 0, min(min_keep, int(active.sum()))
        for row in sorted(mine, reverse=True):
            if kept >= bound:
                rows.append(row)
            kept += row[3]
    present = sum(int((~mask).sum()) for mask in masks.values())
    order = sorted(row for row in rows if row[3])
    totals = [present, *(present + np.cumsum([row[3] for row in order], dtype=int))]
    best = min(range(len(totals)), key=lambda i: (abs(totals[i] - target), i))
    keep = [masks[name].clone() for name in scores]
    for _, t, r, _ in order[:best]:
        keep[t][r] = False
    return keep


@pytest.mark.parametrize("seed", range(40))
def test_rows_equal_a_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(7, 5), (12, 3, 2), (4, 20), (9,), (1, 1), (3, 0)]
    levels = int(rng.choice([2, 4, 1000]))  # integers: their squares add up without rounding
    scores = {
        f"l{i}": torch.from_numpy(rng.integers(-levels, levels, shape).astype(np.float32))
        for i, shape in enumerate(shapes)
    }
    masks = dense_like(scores)
    if seed % 2:
        masks = MaskSet({n: torch.from_numpy(rng.random(s.shape) > 0.3) for n, s in scores.items()})
    total, min_keep = sum(s.numel() for s in scores.values()), int(rng.integers(0, 7))
    present = sum(n - kept for kept, n in masks.counts().values())
    target = int(rng.integers(present, round(0.7 * total)))
    chosen = select(
        *(scores, masks, target / total), granularity="row", min_keep_per_layer=min_keep
    )
    expected = rows_oracle(scores, masks, target, min_keep)
    for name, mask in zip(scores, expected, strict=True):
        assert torch.equal(chosen[name], mask), name


def test_rows_of_one_size_are_exact_to_one_row() -> None:
    scores = {"a": torch.randn(40, 25), "b": torch.randn(60, 5, 5)}
    masks = dense_like(scores)
    for off in range(0, 2450, 35):
        counts = select(scores, masks, off / 2500, granularity="row").counts()
        gone = sum(n - kept for kept, n in counts.values())
        assert gone % 25 == 0
        assert abs(gone - off) <= 12


def test_rows_nest_when_monotone() -> None:
    scores = {"a": torch.rand(40, 10), "b": torch.rand(30, 7)}
    masks = dense_like(scores)
    for sparsity in (0.1, 0.3, 0.31, 0.6, 0.9):
        after = select(scores, masks, sparsity, granularity="row")
        assert (after & masks) == after
        assert abs(after.sparsity() * 610 - sparsity * 610) <= 5.5
        masks = after
    assert select(scores, masks, 0.2, granularity="row") == masks


def test_rows_under_a_layer_scope_carry_what_rounding_leaves() -> None:
    scores = {f"l{i}": torch.rand(10, 4) for i in range(8)}
    counts = select(scores, dense_like(scores), 0.55, scope="layer", granularity="row").counts()
    assert sum(n - kept for kept, n in counts.values()) == round(0.55 * 320)
    assert all(abs(n - kept - 22) <= 2 for kept, n in counts.values())
    plan = LayerPlan({f"l{i}": 0.0 if i % 2 else 0.5 for i in range(8)})
    counts = select(scores, dense_like(scores), 0.3, scope=plan, granularity="row").counts()
    assert all(counts[f"l{i}"] == (40, 40) for i in (1, 3, 5, 7))
    assert sum(n - kept for kept, n in counts.values()) == 96


def test_rows_keep_a_minimum_and_name_what_can_be_reached() -> None:
    scores = {"weak": torch.rand(10, 3) * 1e-3, "strong": torch.rand(10, 3) + 1.0}
    counts = select(
        scores, dense_like(scores), 0.5, granularity="row", min_keep_per_layer=4
    ).counts()
    assert counts == {"weak": (6, 30), "strong": (24, 30)}
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.8 with these minima"):
        select(scores, dense_like(scores), 0.9, granularity="row", min_keep_per_layer=4)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_rows_have_equal_norms_wherever_they_stand(threads: int) -> None:
    """A sum whose order depended on the number of rows would break these ties by chance."""
    torch.set_num_threads(threads)
    for seed in range(5):
        row = torch.rand(1, 40_001, generator=torch.Generator().manual_seed(seed))
        three = row.expand(3, -1).contiguous()
        for scores, sparsity in (({"a": three, "b": row}, 0.75), ({"a": row, "b": three}, 0.25)):
            chosen = select(
                *(scores, dense_like(scores), sparsity), granularity="row", min_keep_per_layer=0
            )
            assert not chosen["a"].any()
            assert chosen["b"].all()


NM = {"granularity": "n:m", "n_m": (2, 4)}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"granularity": "block"}, ValueError, "granularity must be one of .*, got 'block'"),
        ({"granularity": "n:m"}, TypeError, "n_m must be two integers .*, got None"),
        ({**NM, "n_m": (2.0, 4)}, TypeError, r"n_m must be two integers .*, got \(2\.0, 4\)"),
        ({**NM, "n_m": (4, 4)}, ValueError, r"n_m must be \(n, m\) with 0 < n < m, got \(4, 4\)"),
        ({**NM, "n_m": (0, 4)}, ValueError, r"n_m must be \(n, m\) with 0 < n < m, got \(0, 4\)"),
        ({"n_m": (2, 4)}, ValueError, r"n_m must be None with granularity 'element', got \(2, 4\)"),
        ({**NM, "on_misfit": "drop"}, ValueError, "on_misfit must be 'raise' or 'skip'"),
        ({**NM, "scope": "erk"}, ValueError, "scope must be 'global' or 'layer' with .* got 'erk'"),
        (
            {**NM, "sparsity": 0.6},
            ValueError,
            r"must be 1 - n / m = 0\.5 for n_m .*, got 0\.6",
        ),
        ({**NM, "min_keep_per_layer": 5}, ValueError, "within what 2:4 keeps of w, got 5"),
        ({**NM, "min_keep_per_unit": 1}, ValueError, "must be 0 with granularity 'n:m', got 1"),
        ({"granularity": "row", "min_keep_per_unit": 1}, ValueError, "must be 0 with granularity"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_options(options: dict[str, object], error: type[Exception], text: str) -> None:
    scores = {"w": torch.rand(2, 4)}
    arguments = {"sparsity": 0.5, **options}
    with pytest.raises(error, match=text):
        select(scores, dense_like(scores), **arguments)  # type: ignore[arg-type]
