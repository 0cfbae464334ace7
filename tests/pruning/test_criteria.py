"""Criteria: values, precision, determinism, registration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood.pruning import (
    Criterion,
    Magnitude,
    MaskMatchError,
    MaskSet,
    Random,
    prune,
    register_criterion,
)
from sapwood.pruning.criteria import describe_criterion, resolve_criterion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_magnitude_in_the_precision_of_scores(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2).to(dtype)
    scores = Magnitude().scores(layer, MaskSet.dense(layer))["weight"]
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scores, layer.weight.detach().to(scores.dtype).abs())
    assert not scores.requires_grad


def test_magnitude_to_a_power() -> None:
    layer = nn.Linear(3, 2)
    scores = Magnitude(p=2).scores(layer, MaskSet.dense(layer))["weight"]
    torch.testing.assert_close(scores, layer.weight.detach().square())


@pytest.mark.parametrize("p", [0.0, -1.0, math.nan, math.inf])
def test_magnitude_power_must_be_positive(p: float) -> None:
    with pytest.raises(ValueError, match="Magnitude: p must be finite and positive"):
        Magnitude(p=p)


def test_random_depends_on_seed_and_name_only() -> None:
    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(50, 40))
    masks = MaskSet.dense(net)
    state = torch.random.get_rng_state()
    first, again = (Random(seed=4).scores(net, masks) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in masks)
    assert not torch.equal(first["0.weight"], first["1.weight"])
    assert not torch.equal(first["0.weight"], Random(seed=5).scores(net, masks)["0.weight"])
    assert abs(float(first["0.weight"].mean()) - 0.5) < 0.03


def test_masks_of_another_model_are_refused() -> None:
    masks = MaskSet({"other.weight": torch.ones(2, 2).bool()})
    for criterion in (Magnitude(), Random()):
        with pytest.raises(MaskMatchError, match=f"{type(criterion).__name__}.scores: every mask"):
            criterion.scores(nn.Linear(2, 2), masks)


@dataclasses.dataclass(frozen=True)
class Reversed:
    """The largest weights go."""

    scale: float = 1.0

    @property
    def needs_data(self) -> bool:
        return False

    def scores(
        self, model: nn.Module, masks: MaskSet, batch: Any = None, loss_fn: Any = None
    ) -> dict[str, Tensor]:
        scores = Magnitude().scores(model, masks)
        return {name: -self.scale * score for name, score in scores.items()}


def test_a_registered_criterion_works_by_name() -> None:
    register_criterion("reversed", Reversed)
    register_criterion("reversed", Reversed)
    layer = nn.Linear(4, 4)
    largest = layer.weight.detach().abs().flatten().topk(8).indices
    masks = prune(layer, 0.5, "reversed")
    assert not masks["weight"].flatten()[largest].any()
    assert isinstance(Reversed(), Criterion)
    assert describe_criterion(Reversed(2.0)) == {"name": "reversed", "parameters": {"scale": 2.0}}
    with pytest.raises(ValueError, match="name must be free, got 'reversed'"):
        register_criterion("reversed", Magnitude)


def test_unknown_criteria() -> None:
    with pytest.raises(ValueError, match=r"prune: criterion must be one of \[.*'magnitude'"):
        prune(nn.Linear(2, 2), 0.5, "magnitud")
    with pytest.raises(TypeError, match="must be a name or have needs_data and scores, got int"):
        resolve_criterion(3, "here")  # type: ignore[arg-type]


class NeedsData(Reversed):
    @property
    def needs_data(self) -> bool:
        return True


def test_prune_asks_for_the_batch_that_a_criterion_needs() -> None:
    with pytest.raises(ValueError, match="batch must be given for NeedsData, got None"):
        prune(nn.Linear(2, 2), 0.5, NeedsData())
    assert prune(nn.Linear(2, 2), 0.5, NeedsData(), batch=(1, 2)).sparsity() == 0.5


def test_prune_out_of_place_leaves_the_weights() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    masks = prune(layer, 0.5, inplace=False)
    assert torch.equal(layer.weight.detach(), before)
    prune(layer, 0.5)
    assert torch.equal(layer.weight.detach() != 0, masks["weight"])


@pytest.mark.parametrize("sparsity", [math.nan, math.inf, 1.0, -0.5])
def test_prune_checks_the_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match="prune: sparsity must be finite and in"):
        prune(nn.Linear(2, 2), sparsity)


def test_prune_refuses_nan_weights_and_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data[0, 0] = math.nan
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"score 1\.weight must hold numbers, got 1 NaN values"):
        prune(net, 0.5)
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(before, net.parameters(), strict=True)
    )
