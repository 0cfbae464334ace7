"""State dicts of other tools: outputs before and after are the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sapwood.pruning import (
    MaskMatchError,
    MaskSet,
    from_torch_prune,
    from_torchao,
    prune,
    to_torch_prune,
)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def l1(model: nn.Sequential) -> None:
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.l1_unstructured(model[2], "bias", amount=1)


def globally(model: nn.Sequential) -> None:
    pairs = [(model[0], "weight"), (model[2], "weight")]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.6)


def stacked(model: nn.Sequential) -> None:
    torch_prune.l1_unstructured(model[0], "weight", amount=0.3)
    torch_prune.random_unstructured(model[0], "weight", amount=0.3)


def structured(model: nn.Sequential) -> None:
    torch_prune.ln_structured(model[2], "weight", amount=0.25, n=2, dim=0)


@pytest.mark.parametrize("how", [l1, globally, stacked, structured])
def test_torch_prune_round_trip(how: Callable[[nn.Sequential], None]) -> None:
    pruned = network()
    how(pruned)
    state = copy.deepcopy(pruned.state_dict())
    masks, plain_state = MaskSet.from_torch_prune(state)
    plain = network()
    plain.load_state_dict(plain_state)
    x = torch.randn(5, 6)
    assert torch.equal(plain(x), pruned(x))
    assert masks.check(plain) == []
    back = to_torch_prune(from_torch_prune(state, keep_orig=True)[1], masks)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    other = network()
    how(other)
    other.load_state_dict(back)
    assert torch.equal(other(x), pruned(x))


def test_keep_orig_keeps_masked_values() -> None:
    model = network()
    weight = model[0].weight.detach().clone()
    l1(model)
    _, plain = from_torch_prune(model.state_dict(), keep_orig=True)
    assert torch.equal(plain["0.weight"], weight)
    assert int((from_torch_prune(model.state_dict())[1]["0.weight"] == 0).sum()) == 24


def test_wrapped_models() -> None:
    model = network()
    l1(model)
    masks, plain = from_torch_prune(nn.DataParallel(model).state_dict())
    assert list(masks) == ["0.weight", "2.bias"]
    network().load_state_dict(plain)


def test_torchao_keys() -> None:
    weight, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    masks, plain = from_torchao(
        {
            "body.0.parametrizations.weight.original": weight,
            "body.0.parametrizations.weight.0.mask": mask.float(),
            "parametrizations.weight.original": weight,
            "parametrizations.weight.0.mask": mask,
            "parametrizations.weight.1.mask": torch.ones(3, 4),
            "body.0.bias": torch.ones(3),
        }
    )
    assert set(masks) == {"body.0.weight", "weight"}
    assert all(torch.equal(found, mask) for found in masks.values())
    assert torch.equal(plain["weight"], torch.where(mask, weight, torch.zeros(())))
    assert torch.equal(plain["body.0.bias"], torch.ones(3))


PAIR = {"w_orig": torch.ones(2, 3), "w_mask": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"w_orig": PAIR["w_orig"]}, "must have an original and a mask, got no mask for 'w'"),
        ({"w_mask": PAIR["w_mask"]}, "got no original for 'w'"),
        ({**PAIR, "w_mask": torch.ones(3, 2)}, r"must have shape \(2, 3\), got \(3, 2\)"),
        ({**PAIR, "w_mask": torch.full((2, 3), 0.5)}, "must hold 0 and 1, got other values"),
        ({**PAIR, "w_mask": torch.full((2, 3), torch.nan)}, "must hold 0 and 1"),
    ],
    ids=["no-mask", "no-original", "shape", "half", "nan"],
)
def test_bad_pairs(state: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=f"from_torch_prune: .*{text}"):
        from_torch_prune(state)
    renamed = {
        {"w_orig": "parametrizations.w.original", "w_mask": "parametrizations.w.0.mask"}[k]: v
        for k, v in state.items()
    }
    with pytest.raises(ValueError, match=f"from_torchao: .*{text}"):
        from_torchao(renamed)


def test_masks_of_another_model() -> None:
    model = network()
    masks = prune(model, 0.5)
    with pytest.raises(MaskMatchError, match=r"every mask must have an entry .* for '0\.weight'"):
        to_torch_prune({"1.weight": torch.ones(1)}, masks)
    state = {**model.state_dict(), "0.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"0\.weight must have shape \(2, 2\), got \(8, 6\)"):
        to_torch_prune(state, masks)
