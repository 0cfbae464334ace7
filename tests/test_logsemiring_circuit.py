"""Sum-product circuits: what they compute, how exactly, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import sapwood
from sapwood.cli.benchmarks.logsemiring_circuits import addition
from sapwood.ops import CircuitSum, LogCircuit, Selector, log_circuit, log_scan
from tests import log_circuits

INF, NAN = math.inf, math.nan
COIN = CircuitSum([[(0,), (1,)]])


def value_and_gradient(x: Tensor, circuit: LogCircuit, *seen: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = log_circuit(x, circuit, *seen)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def masses_of_sums(p: Tensor, digits: int, base: int, wanted: Sequence[int]) -> Tensor:
    """By enumeration, (2 digits, base): what each digit of all pairs with that sum weighs."""
    total = sum(d * base**i for i, d in enumerate(wanted))
    masses = torch.zeros_like(p)
    for choice in itertools.product(range(base), repeat=2 * digits):
        if sum(d * base ** (i // 2) for i, d in enumerate(choice)) == total:
            weight = math.prod(float(p[i, d]) for i, d in enumerate(choice))
            for i, d in enumerate(choice):
                masses[i, d] += weight
    return masses


# Values and gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0, 0, 0), (2, 1, 1), (1, 2, 0), (1, 2, 1)])
def test_gradients_are_posterior_marginals(wanted: tuple[int, ...]) -> None:
    """Of logits they are the posterior less the prior; both by enumeration of all numbers."""
    digits, base = 2, 3
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2 * digits, 1, base, generator=g, dtype=torch.float64)
    prior = x[:, 0].softmax(1)
    masses = masses_of_sums(prior, digits, base, wanted)
    mass = masses[0].sum()
    y, slope = value_and_gradient(x, addition(digits, base), torch.tensor([wanted]))
    torch.testing.assert_close(y[0, 0], mass.log())
    torch.testing.assert_close(slope[:, 0], masses / mass - prior)


@pytest.mark.parametrize("states", [1, 2, 5])
def test_a_hidden_markov_model_is_a_chain(states: int) -> None:
    """The forward algorithm: sums over the state before, those of one step side by side."""
    steps, rows = 7, 3
    g = torch.Generator().manual_seed(states)
    init = torch.randn(rows, states, generator=g, dtype=torch.float64)
    t = torch.randn(rows, steps, states, states, generator=g, dtype=torch.float64)
    inputs = states + steps * states**2
    before, sums = range(states), list[CircuitSum]()
    for step in range(steps):
        first = states + step * states**2
        for j in range(states):
            sums.append(CircuitSum([[(b, first + i * states + j) for i, b in enumerate(before)]]))
        before = range(inputs + len(sums) - states, inputs + len(sums))
    circuit = LogCircuit(inputs, sums, list(before))
    x = torch.cat([init, t.flatten(1)], 1)
    y, slope = value_and_gradient(x, circuit)
    t.requires_grad_()
    wanted = log_scan(t, init)
    torch.testing.assert_close(y, wanted.detach())
    (grad,) = torch.autograd.grad(wanted.sum(), t)
    torch.testing.assert_close(slope[:, states:], grad.flatten(1))


def test_heads_are_log_softmax() -> None:
    heads = [(0, 4), (4, 5), (6, 6), (7, 10)]
    circuit = LogCircuit(10, [], range(10), heads)
    x = 30 * torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    wanted = x.double()
    for begin, end in heads:
        wanted[:, begin:end] = wanted[:, begin:end].log_softmax(1)
    torch.testing.assert_close(log_circuit(x, circuit).double(), wanted, rtol=3e-7, atol=1e-6)


def test_blocks_are_inputs_side_by_side() -> None:
    circuit, x = addition(1), torch.randn(2, 4, 10)
    seen = torch.tensor([[3, 0], [9, 0], [0, 1], [8, 1]])
    flat = torch.cat([x[0], x[1]], 1)
    assert torch.equal(log_circuit(x, circuit, seen), log_circuit(flat, circuit, seen))
    assert torch.equal(
        log_circuit(x.mT.contiguous().mT, circuit, seen), log_circuit(x, circuit, seen)
    )


def test_arrays_of_terms_are_lists_of_terms() -> None:
    array = np.array([[[0, 2], [1, 3], [-1, -1]], [[-1, 0], [0, 1], [2, 3]]])
    lists = [[(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    x, seen = torch.randn(6, 4), torch.tensor([[0], [1], [2], [-1], [0], [1]])
    first, second = (
        log_circuit(x, LogCircuit(4, [CircuitSum(terms, [Selector(0, 0, 2)])], [4]), seen)
        for terms in (array, lists)
    )
    assert torch.equal(first, second)
    assert first.isinf().flatten().tolist() == [False, False, True, True, False, False]


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 4, 15])
def test_logits_of_any_scale(digits: int) -> None:
    """Logits of 1e4: within 1e-6 of float64."""
    circuit = addition(digits)
    g = torch.Generator().manual_seed(digits)
    x = 1e4 * torch.randn(2 * digits, 8, 10, generator=g)
    seen = torch.randint(10, (8, digits + 1), generator=g)
    seen[:, -1] = seen[:, -1] % 2
    y = log_circuit(x, circuit, seen)
    with sapwood.backend("reference"):
        wanted = log_circuit(x.double(), circuit, seen)
    assert wanted.abs().max() > 1e4
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=0)


def test_a_long_chain_keeps_its_error() -> None:
    """1000 sums whose values swing by 1e4: a state in float32 would lose ten times as much."""
    length = 1000
    sums = [CircuitSum([[(0,), (1,)]])]
    for j in range(1, length):
        before = 2 * length + j - 1
        sums.append(CircuitSum([[(before, 2 * j), (before, 2 * j + 1)]]))
    circuit = LogCircuit(2 * length, sums, [2 * length + length - 1])
    g = torch.Generator().manual_seed(0)
    swing = 1e4 * torch.tensor([1.0, -1.0]).repeat(length // 2)
    x = (swing[:, None] + torch.randn(length, 2, generator=g)).flatten()[None]
    wanted = x.double().view(length, 2).logsumexp(1).sum()
    state = torch.tensor(0.0)
    for term in x.view(length, 2):
        state = torch.logsumexp(state + term, 0)
    error = abs(float(log_circuit(x, circuit)) - float(wanted))
    assert error <= 1e-4
    assert abs(float(state) - float(wanted)) > 10 * error


# Evidence, infinities and NaN ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 10, -(2**63), 2**63 - 1, 2**31, -(2**32)])
def test_evidence_that_is_not_known_has_no_mass(value: int) -> None:
    circuit, x = addition(1), torch.randn(2, 2, 10)
    y, slope = value_and_gradient(x, circuit, torch.tensor([[7, 0], [value, 0]]))
    assert y[0].isfinite()
    assert y[1] == -INF
    assert (slope[:, 0] != 0).any()
    assert (slope[:, 1] == 0).all()


def test_infinity_is_shared() -> None:
    circuit = LogCircuit(3, [CircuitSum([[(0,), (1,), (2,)]])], [3])
    y, slope = value_and_gradient(torch.tensor([[INF, 1.0, INF], [-INF, -INF, -INF]]), circuit)
    assert y.flatten().tolist() == [INF, -INF]
    assert slope.tolist() == [[0.5, 0, 0.5], [0, 0, 0]]


def test_nan_reaches_only_what_reads_it() -> None:
    circuit = LogCircuit(4, [COIN, CircuitSum([[(2,), (3,)]])], [4, 5])
    x = torch.tensor([[0.0, NAN, 0.0, 0.0]])
    y = log_circuit(x, circuit)
    assert y[0, 0].isnan()
    assert float(y[0, 1]) == pytest.approx(math.log(2))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(log_circuit(x, circuit)[0, 1], x)
    assert slope.tolist() == [[0, 0, 0.5, 0.5]]
    (slope,) = torch.autograd.grad(log_circuit(x, circuit)[0, 0], x)
    assert slope[0, :2].isnan().all()
    assert slope[0, 2:].tolist() == [0, 0]


def test_sums_without_terms_and_terms_without_factors() -> None:
    circuit = LogCircuit(0, [CircuitSum([[]]), CircuitSum([[(), ()]])], [0, 1, 1])
    y = log_circuit(torch.empty(2, 0), circuit)
    torch.testing.assert_close(y, torch.tensor([[-INF, math.log(2), math.log(2)]] * 2))


# The object and its backends ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_backends_agree(seed: int) -> None:
    circuit, columns = log_circuits.anything(seed, 3 + seed, 10)
    x = torch.randn(4, 3 + seed, dtype=torch.float64)
    seen = log_circuits.evidence(seed, 4, columns)
    with sapwood.backend("native"):
        native = value_and_gradient(x, circuit, seen)
    with sapwood.backend("reference"):
        wanted = value_and_gradient(x, circuit, seen)
    for found, want in zip(native, wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_explain() -> None:
    explanation = sapwood.explain(log_circuit, torch.randn(2, 2), LogCircuit(2, [COIN], [2]))
    assert explanation.op == "log_circuit"
    assert [c.name for c in explanation.candidates] == ["native", "reference"]
    assert explanation.chosen == "native"


def test_tables_are_moved_once() -> None:
    circuit = addition(1)
    here, meta = circuit.tables(torch.device("cpu")), circuit.tables(torch.device("meta"))
    assert here.dtype == torch.int32
    assert meta.shape == here.shape
    assert circuit.tables(torch.device("cpu")) is here
    assert circuit.tables(torch.device("meta")) is meta


def test_repr_says_how_large_it_is() -> None:
    assert repr(addition(1)) == "LogCircuit(20 inputs, 3 sums of 102 terms, 1 results)"
