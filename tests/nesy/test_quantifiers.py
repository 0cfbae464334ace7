"""Quantifiers over log truths against their definitions on plain truths."""

from __future__ import annotations

import math

import pytest
import torch

from sapwood import nesy

T = torch.tensor([0.9, 0.75, 0.4, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("agg", "every", "some"),
    [
        ("product", T.prod(), 1 - (1 - T).prod()),
        ("min", T.min(), T.max()),
        ("godel", T.min(), T.max()),
        ("pmean", 1 - (1 - T).square().mean().sqrt(), T.square().mean().sqrt()),
        ("lukasiewicz", (1 - (1 - T).sum()).clamp(min=0), T.sum().clamp(max=1)),
    ],
)
def test_definitions(agg: str, every: torch.Tensor, some: torch.Tensor) -> None:
    torch.testing.assert_close(nesy.forall(T.log(), agg).exp(), every)
    torch.testing.assert_close(nesy.exists(T.log(), agg).exp(), some)


def test_mean_of_logs() -> None:
    torch.testing.assert_close(nesy.forall(T.log()), T.log().mean())
    with pytest.raises(ValueError, match="agg must have an existential reading, got 'mean_nll'"):
        nesy.exists(T.log(), "mean_nll")


@pytest.mark.parametrize("agg", ["product", "mean_nll", "min", "pmean", "lukasiewicz"])
def test_false_rows(agg: str) -> None:
    """A row of truth 0: no NaN, and no gradient through what is -inf."""
    t = torch.tensor([[0.5, 0.0], [0.8, 0.3]]).log().requires_grad_()
    found = nesy.forall(t, agg, dim=1)
    assert not bool(found.isnan().any())
    (grad,) = torch.autograd.grad(found[1], t)
    assert not bool(grad.isnan().any())
    assert nesy.forall(torch.tensor([-math.inf, -math.inf]), agg) == -math.inf


def test_p_and_dimensions() -> None:
    t = torch.rand(3, 4, dtype=torch.float64)
    found = nesy.exists(t.log(), "pmean", p=6, dim=1).exp()
    torch.testing.assert_close(found, t.pow(6).mean(1).pow(1 / 6))
    assert nesy.forall(torch.empty(0), "product") == 0
    for call in (lambda: nesy.forall(torch.empty(0)), lambda: nesy.exists(torch.empty(0), "min")):
        with pytest.raises(ValueError, match="must have rows"):
            call()
    with pytest.raises(ValueError, match=r"p must be at least 1, got 0\.5"):
        nesy.forall(t.log(), "pmean", p=0.5)
    with pytest.raises(ValueError, match="agg must be one of"):
        nesy.forall(t.log(), "mean")


def test_loss_is_the_mean_negative_log_truth() -> None:
    n = nesy.observed(torch.tensor([1, 2, 2]))
    program = nesy.fmap(lambda d: d == n, nesy.choice({1: 0.25, 2: 0.75}))
    expected = -(math.log(0.25) + 2 * math.log(0.75)) / 3
    assert nesy.loss(program).item() == pytest.approx(expected)
