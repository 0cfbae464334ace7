"""LogLinear and HMM against sums over all states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sapwood import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def enumerate_paths(model: nn.HMM, symbols: Tensor) -> dict[tuple[int, ...], float]:
    """log p(states, symbols) of one sequence (L,), term by term in float64."""
    start, transition, emission = (
        torch.log_softmax(p.detach().double(), -1)
        for p in (model.start, model.transition, model.emission)
    )
    joint = {}
    for path in itertools.product(range(model.num_states), repeat=len(symbols)):
        total = float(start[path[0]] + emission[path[0], symbols[0]])
        for before, here, symbol in zip(path, path[1:], symbols[1:].tolist(), strict=False):
            total += float(transition[before, here] + emission[here, symbol])
        joint[path] = total
    return joint


@pytest.mark.parametrize("length", [1, 2, 5])
def test_hmm_is_the_sum_over_all_paths(length: int) -> None:
    model, symbols = nn.HMM(3, 4), torch.randint(4, (2, length))
    with torch.no_grad():
        got = model(symbols)
        log_prob, path = model.decode(symbols)
    for i, sequence in enumerate(symbols):
        joint = enumerate_paths(model, sequence)
        total = torch.logsumexp(torch.tensor(list(joint.values())), 0)
        assert math.isclose(float(got[i]), float(total), rel_tol=1e-5)
        best = max(joint, key=joint.__getitem__)
        assert tuple(path[i].tolist()) == best
        assert math.isclose(float(log_prob[i]), joint[best], rel_tol=1e-5)


def test_hmm_of_all_sequences_sums_to_one() -> None:
    model = nn.HMM(2, 3)
    symbols = torch.tensor(list(itertools.product(range(3), repeat=4)))
    torch.testing.assert_close(model(symbols).exp().sum(), torch.tensor(1.0))


def test_hmm_learns_and_keeps_forbidden_transitions() -> None:
    model = nn.HMM(3, 4)
    with torch.no_grad():
        model.transition[2, 0] = -math.inf
    symbols = torch.randint(4, (16, 20)).sort(1).values
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = -model(symbols).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert model.transition[2, 0] == -math.inf
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    path = model.sample_states(symbols, 50)
    assert path.shape == (50, 16, 20)
    assert not ((path[..., :-1] == 2) & (path[..., 1:] == 0)).any()


def test_hmm_draws_by_the_posterior() -> None:
    model, symbols = nn.HMM(2, 3), torch.tensor([[0, 2, 1]])
    joint = enumerate_paths(model, symbols[0])
    wanted = torch.softmax(torch.tensor(list(joint.values())), 0)
    drawn = model.sample_states(symbols, 20_000, torch.Generator().manual_seed(1))[:, 0]
    code = (drawn * torch.tensor([4, 2, 1])).sum(1)
    shares = code.bincount(minlength=8) / 20_000
    assert (shares - wanted).abs().max() < 0.015


def test_log_linear() -> None:
    layer = nn.LogLinear(5, 3)
    x = torch.log_softmax(torch.randn(2, 7, 5), -1)
    y = layer(x)
    want = (x.exp() @ torch.softmax(layer.logits, -1)).log()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(y.exp().sum(-1), torch.ones(2, 7))
    assert repr(layer) == "LogLinear(in_features=5, out_features=3)"


def test_state_is_saved() -> None:
    model, other = nn.HMM(3, 4), nn.HMM(3, 4)
    other.load_state_dict(model.state_dict())
    symbols = torch.randint(4, (2, 6))
    assert torch.equal(model(symbols), other(symbols))
    assert repr(model) == "HMM(num_states=3, num_symbols=4)"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^sapwood\.HMM: num_states must be at least 1, got 0$"):
        nn.HMM(0, 3)
    with pytest.raises(ValueError, match=r"^sapwood\.LogLinear: out_features must be at least 1"):
        nn.LogLinear(3, 0)
    model = nn.HMM(2, 3)
    with pytest.raises(TypeError, match=r"^sapwood\.HMM: symbols must be torch\.int64, got"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^sapwood\.HMM: symbols must have 2 dimensions, got"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^sapwood\.HMM: symbols must have L >= 1, got \(2, 0\)$"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^sapwood\.LogLinear: x must have a last dimension of 5"):
        nn.LogLinear(5, 3)(torch.zeros(4))
