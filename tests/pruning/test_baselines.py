"""The recipes that prune in stages: their order, their counts, their rewinding."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood.pruning import (
    DynamicSparseTraining,
    LayerPlan,
    LotteryTicket,
    MaskSet,
    OneShot,
    Progress,
    ProgressiveMagnitude,
    PruneAtInit,
    PruneFinetuneConfig,
    PruningResult,
    TrainConfig,
    TrainPruneFinetune,
    prune,
)

QUICK = TrainConfig(epochs=3, lr=0.1, batch_size=16, weight_decay=0.0)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def problem(rows: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def off(masks: MaskSet | None) -> int:
    assert masks is not None
    return sum(total - kept for kept, total in masks.counts().values())


def steps_of(stages: list[Progress], stage: str) -> list[int]:
    return [progress.step for progress in stages if progress.stage == stage]


# Lottery tickets.


def test_every_round_is_exact_and_nested() -> None:
    model, data = network(), problem()
    results = LotteryTicket([0.5, 0.8], QUICK).fit(model, data, data)
    ladder = LotteryTicket([0.5, 0.8], QUICK).sparsities()
    # 0.8^3 > 0.5 > 0.8^4, and 0.8^4 * 0.5 > 0.2 > 0.8^5 * 0.5
    assert ladder == pytest.approx([0.2, 0.36, 0.488, 0.5, 0.6, 0.68, 0.744, 0.7952, 0.8])
    assert [off(r.masks) for r in results[1:]] == [round(s * (8 * 16 + 16 * 3)) for s in ladder]
    assert results[0].masks is None
    for before, after in pairwise(results[1:]):
        assert before.masks is not None
        assert after.masks is not None
        assert after.masks.overlap(before.masks, kind="keep_share") == 1.0
    assert [r.stage for r in results[:2]] == ["round 0 of 9", "round 1 of 9"]


def test_the_output_layer_loses_half_as_much() -> None:
    data = problem()
    results = LotteryTicket(0.1, QUICK).fit(network(), data, data)
    masks = results[-1].masks
    assert masks is not None
    (first, n), (last, m) = masks.counts().values()
    assert off(masks) == round(0.1 * (n + m))
    # rate r of the first and r / 2 of the last tensor: r * 128 + r / 2 * 48 = 17.6
    assert abs((n - first) - 128 * 17.6 / 152) <= 1
    assert abs((m - last) - 24 * 17.6 / 152) <= 1


def test_global_scope_ranks_all_tensors_together() -> None:
    model, data = network(), problem()
    recipe = LotteryTicket(0.2, QUICK, scope="global")
    masks = recipe.fit(model, data, data)[-1].masks
    dense = network()
    trained = LotteryTicket(0.2, QUICK, scope="global")
    trained.sparsities()  # one round
    weights = _train_dense(dense, data)
    assert masks == prune(weights, 0.2, inplace=False)


def _train_dense(model: nn.Module, data: tuple[Tensor, Tensor]) -> nn.Module:
    return ProgressiveMagnitude(None, QUICK).fit(model, data, data).model


class Snapshots:
    """The weights of a model before and after every step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[tuple[str, int, Tensor]] = []

    def __call__(self, progress: Progress) -> None:
        weight = self.model.get_parameter("0.weight").detach().clone()
        self.seen.append((progress.stage, progress.step, weight))


@pytest.mark.parametrize("rewind_step", [0, 1, 5, 7])
def test_survivors_return_to_the_weights_of_the_rewind_step(rewind_step: int) -> None:
    model, data = network(), problem()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    snapshots = Snapshots(model)
    recipe = LotteryTicket(0.2, QUICK, rewind_step=rewind_step, progress=snapshots)
    results = recipe.fit(model, data, data)
    dense = {step: weight for stage, step, weight in snapshots.seen if stage == "round 0 of 1"}
    expected = dense[rewind_step] if rewind_step else start["0.weight"]
    assert torch.equal(recipe.rewind_weights_["0.weight"], expected)
    later = [step for stage, step, _ in snapshots.seen if stage == "round 1 of 1"]
    assert later == list(range(rewind_step + 1, 16))  # 3 epochs of 5 steps
    assert results[1].steps == 15 - rewind_step


@pytest.mark.parametrize("rewind_step", [0, 3, 5])
def test_a_round_without_cuts_repeats_the_dense_training(rewind_step: int) -> None:
    """Same weights, data order, dropout and learning rates from the rewind step on.

    A cut of nothing must train to the same bits, up to momentum, which starts anew.
    """
    config = TrainConfig(epochs=3, lr=0.1, batch_size=16, momentum=0.0)
    model, data = network(), problem()
    snapshots = Snapshots(model)
    tiny = 1e-4  # of 176 weights: rounds to none
    LotteryTicket(tiny, config, rewind_step=rewind_step, progress=snapshots).fit(model, data, data)
    dense = {step: weight for stage, step, weight in snapshots.seen if "0 of" in stage}
    again = {step: weight for stage, step, weight in snapshots.seen if "1 of" in stage}
    assert list(again) == list(range(rewind_step + 1, 16))
    for step, weight in again.items():
        assert torch.equal(weight, dense[step]), step


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sparsity": []}, r"sparsity must be positive and rise, got \[\]"),
        ({"sparsity": 0.0}, "sparsity must be positive and rise, got 0"),
        ({"sparsity": [0.5, 0.5]}, r"sparsity must be positive and rise, got \[0.5, 0.5\]"),
        ({"sparsity": 1.0}, r"sparsity must be finite and in \[0, 1\), got 1.0"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\), got 1.0"),
        ({"scope": "erk"}, r"scope must be one of \('layer', 'global'\), got 'erk'"),
        ({"output_factor": 2.0}, r"output_factor must be in \[0, 1\], got 2.0"),
        ({"rewind_step": -1}, "rewind_step must be at least 0, got -1"),
    ],
)
def test_bad_tickets(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.pruning.LotteryTicket: {text}"):
        LotteryTicket(**{"sparsity": 0.5, **arguments})


def test_rewind_step_must_lie_in_the_training() -> None:
    data = problem()
    with pytest.raises(ValueError, match="rewind_step must be less than the 15 steps of a round"):
        LotteryTicket(0.2, QUICK, rewind_step=15).fit(network(), data, data)


# Train, prune, fine-tune.


def fit(config: PruneFinetuneConfig, **options: Any) -> tuple[TrainPruneFinetune, PruningResult]:
    data = problem()
    recipe = TrainPruneFinetune(config, **options)
    return recipe, recipe.fit(network(), data, data)


def test_cuts_are_exact_nested_and_held() -> None:
    seen: list[Progress] = []
    config = PruneFinetuneConfig(QUICK, (0.5, 0.75, 0.9), finetune=TrainConfig(epochs=2))
    recipe, result = fit(config, progress=seen.append)
    assert [off(r.masks) for r in recipe.results_[1:]] == [88, 132, 158]
    names = ["train", "finetune 50 %", "finetune 75 %", "finetune 90 %"]
    assert [r.stage for r in recipe.results_] == names
    assert result.report is not None
    assert result.report.consistent
    assert result.masks is not None
    assert result.masks.check(result.model) == []
    # by default the last two of three epochs are replayed, 5 steps each
    assert steps_of(seen, "finetune 50 %") == list(range(6, 16))
    assert recipe.result_ is result


def test_only_cutting_measures_and_does_not_train() -> None:
    config = PruneFinetuneConfig(QUICK, (0.5, 0.8), finetune=None)
    recipe, result = fit(config)
    assert [r.stage for r in recipe.results_] == ["train", "cut 50 %", "cut 80 %"]
    assert [r.steps for r in recipe.results_] == [15, 0, 0]
    assert result.masks == MaskSet.from_zeros(result.model)
    assert off(result.masks) == round(0.8 * 176)
    x, y = problem()
    with torch.no_grad():
        share = float((result.model(x).argmax(1) == y).double().mean())
    assert result.metric == pytest.approx(share)


def rates(rewind: str, epochs: int = 1) -> list[float]:
    train = TrainConfig(epochs=4, lr=0.4, batch_size=16)
    finetune = TrainConfig(epochs=epochs, lr=0.05, batch_size=16)
    config = PruneFinetuneConfig(train, (0.5,), finetune=finetune, rewind=rewind)  # type: ignore[arg-type]
    return [row["lr"] for row in fit(config)[1].history]


def test_learning_rates_of_fine_tuning() -> None:
    cosine = [0.2 * (1 + math.cos(math.pi * s / 20)) for s in range(20)]
    assert rates("none") == pytest.approx([0.025 * (1 + math.cos(math.pi * 4 / 5))], rel=1e-5)
    assert rates("lr") == pytest.approx([cosine[19]], rel=1e-4)
    assert rates("lr", 2) == pytest.approx([cosine[14], cosine[19]], rel=1e-4)
    whole = rates("weights")
    assert whole == pytest.approx([cosine[s] for s in (4, 9, 14, 19)], rel=1e-4)


@pytest.mark.parametrize("rewind_step", [0, 4])
def test_rewinding_weights_starts_from_them(rewind_step: int) -> None:
    model, data = network(), problem()
    start = model[0].weight.detach().clone()
    snapshots = Snapshots(model)
    config = PruneFinetuneConfig(
        TrainConfig(epochs=3, lr=1e-9, batch_size=16, weight_decay=0.0),
        (0.5,),
        rewind="weights",
        rewind_step=rewind_step,
        finetune=TrainConfig(epochs=1),
    )
    result = TrainPruneFinetune(config, progress=snapshots).fit(model, data, data)
    assert result.masks is not None
    kept = result.masks["0.weight"]
    torch.testing.assert_close(model[0].weight.detach()[kept], start[kept], atol=1e-6, rtol=0)
    steps = [step for stage, step, _ in snapshots.seen if stage.startswith("finetune")]
    assert steps == list(range(rewind_step + 1, 16))


def test_a_trained_model_is_only_cut_and_tuned() -> None:
    config = PruneFinetuneConfig(None, (0.5,), finetune=QUICK, rewind="none")
    recipe, result = fit(config)
    assert [r.stage for r in recipe.results_] == ["finetune 50 %"]
    assert result.config is QUICK


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prune_steps": ()}, r"prune_steps must be positive and rise, got \(\)"),
        ({"prune_steps": (0.9, 0.5)}, "prune_steps must be positive and rise"),
        ({"prune_steps": (1.5,)}, r"prune_steps must be finite and in \[0, 1\), got 1.5"),
        ({"rewind": "all"}, "rewind must be 'none', 'lr' or 'weights', got 'all'"),
        ({"train": None}, "rewind must be 'none' without train, got 'lr'"),
        ({"rewind_step": -2}, "rewind_step must be at least 0, got -2"),
        (
            {"finetune": TrainConfig(epochs=9)},
            "finetune must have at most the 8 epochs of train with rewind='lr', got 9",
        ),
    ],
)
def test_bad_configurations(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.pruning.PruneFinetuneConfig: {text}"):
        PruneFinetuneConfig(**arguments)


# Before training, and moving masks.


@pytest.mark.parametrize("criterion", ["snip", "grasp", "magnitude", "random", "taylor"])
def test_masks_before_training_stay(criterion: str) -> None:
    model, data = network(), problem()
    seen: list[Progress] = []
    recipe = PruneAtInit(0.75, QUICK, criterion=criterion, progress=seen.append)
    result = recipe.fit(model, data, data)
    assert off(result.masks) == 132
    assert {progress.sparsity for progress in seen} == {0.75}
    assert result.masks is not None
    assert result.masks.check(model) == []


def test_snip_masks_come_from_the_initial_weights_and_a_seeded_batch() -> None:
    data = problem()
    first, again = (PruneAtInit(0.5, QUICK).fit(network(), data, data).masks for _ in range(2))
    assert first == again
    other = TrainConfig(epochs=3, lr=0.1, batch_size=16, seed=1)
    assert PruneAtInit(0.5, other).fit(network(), data, data).masks != first


def test_a_control_has_the_layer_budgets_of_the_method() -> None:
    data = problem()
    method = PruneAtInit(0.5, QUICK).fit(network(), data, data).masks
    assert method is not None
    scope = LayerPlan.like(method)
    control = PruneAtInit(0.5, QUICK, criterion="random", scope=scope).fit(network(), data, data)
    assert control.masks is not None
    assert control.masks.counts() == method.counts()
    assert control.masks != method


def test_dynamic_sparse_training_moves_masks_at_fixed_counts() -> None:
    model, data = network(), problem()
    counts: list[dict[str, tuple[int, int]]] = []
    recipe = DynamicSparseTraining(0.6, QUICK, every=3, progress=lambda _: None)
    result = recipe.fit(model, data, data)
    still = DynamicSparseTraining(0.6, QUICK, every=100).fit(network(), data, data)
    assert result.masks is not None
    assert still.masks is not None
    counts = [result.masks.counts(), still.masks.counts()]
    assert counts[0] == counts[1]
    assert result.masks != still.masks
    assert off(result.masks) == round(0.6 * 176)


# Options.


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match=r"PruneAtInit: options must be among .* got 'callback'"):
        PruneAtInit(0.5, callback=print)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every must be an integer, got 1.5"),
        ({"resume": True}, ValueError, "checkpoint must be a folder with resume=True, got None"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        PruneAtInit(0.5, **options)


def test_rules_reach_every_recipe() -> None:
    data = problem()
    results = [
        PruneAtInit(0.5, QUICK, exclude=["3.weight"]).fit(network(), data, data),
        LotteryTicket(0.2, QUICK, include=["0.weight"]).fit(network(), data, data)[-1],
        fit(PruneFinetuneConfig(QUICK, (0.5, 0.6), finetune=QUICK), exclude=["3.*"])[1],
        DynamicSparseTraining(0.5, QUICK, exclude=["3.weight"]).fit(network(), data, data),
    ]
    for result in results:
        assert result.masks is not None
        assert list(result.masks) == ["0.weight"]


# Granularity.


def test_rows_go_as_one_in_every_recipe() -> None:
    data = problem()
    rules: dict[str, Any] = {"granularity": "row", "include": ["0.weight"]}
    results = [
        ProgressiveMagnitude(0.5, QUICK, every=2, **rules).fit(network(), data, data),
        PruneAtInit(0.5, QUICK, **rules).fit(network(), data, data),
        LotteryTicket(0.5, QUICK, rate=0.3, **rules).fit(network(), data, data)[-1],
        fit(PruneFinetuneConfig(QUICK, (0.25, 0.5), finetune=QUICK), **rules)[1],
    ]
    for result in results:
        assert result.masks is not None
        kept = result.masks["0.weight"].sum(1)
        assert kept.tolist().count(8) == 8
        assert kept.tolist().count(0) == 8


def test_n_of_m_at_initialisation_and_in_one_cut() -> None:
    data = problem()
    two_of_four: dict[str, Any] = {"granularity": "n:m", "n_m": (2, 4)}
    results = [
        PruneAtInit(0.5, QUICK, **two_of_four).fit(network(), data, data),
        ProgressiveMagnitude(0.5, QUICK, schedule=OneShot(0.5, at=5), **two_of_four).fit(
            network(), data, data
        ),
    ]
    for result in results:
        assert result.masks is not None
        for mask in result.masks.values():
            assert (mask.view(-1, 4).sum(1) == 2).all()
    with pytest.raises(ValueError, match=r"sparsity must be 1 - n / m = 0\.5"):
        ProgressiveMagnitude(0.5, QUICK, **two_of_four).fit(network(), data, data)


def test_every_unit_keeps_its_best() -> None:
    data = problem()
    result = ProgressiveMagnitude(0.8, QUICK, min_keep_per_unit=1).fit(network(), data, data)
    assert result.masks is not None
    assert off(result.masks) == round(0.8 * 176)
    assert all(bool(mask.any(1).all()) for mask in result.masks.values())


def test_rigl_moves_single_weights_only() -> None:
    with pytest.raises(NotImplementedError, match="granularity must be 'element'"):
        DynamicSparseTraining(0.5, granularity="row")
