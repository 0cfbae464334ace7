"""Plans as circuits against the joint, and against their steps one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood import nesy
from sapwood.nesy import circuits, mnist_add, static
from sapwood.nesy.circuits import Piece, pieces_of
from sapwood.nesy.execute import Execution
from sapwood.nesy.plan import PLANS, Plan, Query
from sapwood.nesy.trace import Keys
from sapwood.ops import logsumexp
from tests.nesy.random_programs import Script


def gradient(script: Script, *, strict: bool) -> Tensor:
    x = script.x.double().requires_grad_()
    mass = script.on(x.float(), script.n).double().log_truth("none", strict=strict)
    (found,) = torch.autograd.grad(
        mass.exp().sum(), x, allow_unused=True, materialize_grads=True
    )  # of masses: log masses of rows without mass have no derivative
    return found


def test_gradients_equal_those_of_the_joint() -> None:
    """Networks, tables, guards, branches and nested blocks; rows without mass give exactly 0."""
    moved = 0
    for seed in range(1, 360, 4):
        script = Script(seed)
        if not script.program().double().log_truth("none").requires_grad:
            continue
        found, expected = gradient(script, strict=False), gradient(script, strict=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        impossible = script.program().double().log_truth("none") == -torch.inf
        if impossible.dim():
            assert bool((found[impossible] == 0).all()), seed
        moved += int(bool(found.abs().sum() > 0))
    assert moved > 10


def long_addition(n: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor]:
    """The sentence, logits (2, B, N, 10) and digits of sums, one of which is impossible."""
    generator = torch.Generator().manual_seed(n)
    reader = nesy.Categorical(nn.Identity(), range(10), name="digit")
    logits = torch.randn(2, 4, n, 10, generator=generator, dtype=dtype)
    sums = mnist_add.sum_digits(torch.randint(10, (4, 2, n), generator=generator))
    sums[3, n - 1] = 30  # no digit, and no sum of two
    return mnist_add.sentence(reader, n), logits, sums


def program_of(formula: Any, logits: Tensor, sums: Tensor, n: int) -> nesy.Program:
    xs, ys = logits.unbind()
    if n == 1:
        xs, ys, sums = xs[:, 0], ys[:, 0], sums[:, 0] + 10 * sums[:, 1]
    found: nesy.Program = formula(xs, ys, nesy.observed(sums))
    return found


def truth(formula: Any, logits: Tensor, sums: Tensor, n: int) -> Tensor:
    return program_of(formula, logits, sums, n).log_truth()


def traced(program: nesy.Program) -> Tensor:
    """What a program does whose structure is not remembered."""
    return program._mass(program._traced(), Query.TRUTH)


def step_by_step(program: nesy.Program) -> Tensor:
    """One sum after the other, as for sums that have no op."""
    keys, found = Keys(), program._traced()
    plan = PLANS.get(found, keys, Query.TRUTH)
    columns = [c.values for c in keys.columns]
    reduce = lambda x: logsumexp(x, -1)  # noqa: E731  not the sum that circuits take
    return Execution(plan, keys.leaves, columns, found.batch, program.dtype, reduce=reduce).run()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 15])
def test_all_ways_are_the_same(n: int) -> None:
    """Values, first and second derivatives; with six digits the carries are a chain."""
    formula, logits, sums = long_addition(n)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()

    def derivatives(way: Callable[[nesy.Program], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = logits.clone().requires_grad_()
        value = way(program_of(formula, x, sums, n))
        (first,) = torch.autograd.grad(value.exp().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), x)
        plain = way(program_of(formula, x, sums, n))
        (once,) = torch.autograd.grad(plain.exp().sum(), x)
        torch.testing.assert_close(once, first.detach(), rtol=1e-12, atol=1e-14)
        return value.detach(), first.detach(), second

    expected = derivatives(step_by_step)
    for way in (traced, nesy.Program.log_truth):
        for one, other in zip(derivatives(way), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert expected[0][3] == -torch.inf
    assert bool((expected[1][:, 3] == 0).all())


@pytest.mark.parametrize("n", [1, 4, 15])
def test_without_gradients_the_values_are_the_same(n: int) -> None:
    formula, logits, sums = long_addition(n, torch.float32)
    expected = truth(formula, logits.clone().requires_grad_(), sums, n)
    assert torch.equal(truth(formula, logits, sums, n), expected)
    with torch.no_grad():
        assert torch.equal(truth(formula, logits.clone().requires_grad_(), sums, n), expected)


def plan_of(program: nesy.Program) -> Plan:
    return PLANS.get(program._traced(), Keys(), Query.TRUTH)


@pytest.mark.parametrize(("n", "sums"), [(1, 1), (2, 5), (4, 15), (15, 56 + 24 + 1)])
def test_an_addition_is_one_circuit(n: int, sums: int) -> None:
    """Two results for each carry in and out, twelve matrices of a chain, and the last sum."""
    formula, logits, data = long_addition(n)
    program = program_of(formula, logits, data, n)
    (piece,), heads = pieces_of(plan_of(program), frozenset([0]))
    assert isinstance(piece, Piece)
    assert piece.circuit.num_sums == sums
    assert heads == {0}
    remembered = static._known
    program.log_truth()
    found = remembered[static._read(program)[0]]
    assert found is not None
    assert found.direct is not None


def test_supports_without_order_beside_integers() -> None:
    """Two columns of one circuit: integers as they are, others by search; floats as data."""
    first = nesy.Categorical(nn.Identity(), [5, 0, 2], name="gaps")
    second = nesy.Categorical(nn.Identity(), range(3), name="run")
    x = torch.randn(6, 3, dtype=torch.float64)
    a, b = torch.tensor([0, 5, 2, 3, -1, 6]), torch.tensor([2, 1, 0, 0, 1, 3])

    @nesy.do
    def both(x: Tensor, a: Any, b: Any) -> Generator[Any, Any, Any]:
        p, q = (yield first(x)), (yield second(x))
        return (p == a) & (q == b)

    log_p = x.log_softmax(-1)
    places = {5: 0, 0: 1, 2: 2}
    expected = [
        (log_p[i, places[u]] if u in places else -math.inf) + (log_p[i, v] if v < 3 else -math.inf)
        for i, (u, v) in enumerate(zip(a.tolist(), b.tolist(), strict=True))
    ]
    for kind in (torch.int64, torch.int8, torch.float32):
        found = both(x, nesy.observed(a.to(kind)), nesy.observed(b.to(kind))).log_truth()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_one_row_for_all_gets_the_gradients_of_all_rows() -> None:
    """A trained table beside a network, of another type."""
    table = nn.Parameter(torch.randn(3, 2).log_softmax(-1))
    after = nesy.Conditional(table, [0, 1], range(3), name="after")
    reader = nesy.Categorical(nn.Identity(), range(3), name="reader")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    n = torch.tensor([0, 1, 1, 0])

    @nesy.do
    def run(x: Tensor, n: Any) -> Generator[Any, Any, Any]:
        d = yield reader(x)
        return (yield after(d)) == n

    found = run(x, nesy.observed(n)).log_truth()
    joint = x.log_softmax(-1).unsqueeze(-1) + table.log_softmax(-1).double()
    expected = joint.logsumexp(1).gather(1, n.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(found.sum(), (x, table))
    for one, other in zip(grads, torch.autograd.grad(expected.sum(), (x, table)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_graph_can_be_walked_twice() -> None:
    formula, logits, sums = long_addition(15)
    x = logits.requires_grad_()
    value = truth(formula, x, sums, 15)[:3].sum()
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (twice,) = torch.autograd.grad(value, x)
    assert torch.equal(once, twice)


def test_long_chains_are_left_to_the_public_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the plan is two circuits and a step, and the heads are normalised before."""
    formula, logits, sums = long_addition(8)
    expected = truth(formula, logits.requires_grad_(), sums, 8)
    monkeypatch.setattr(circuits, "_LONGEST_CHAIN", 2)
    fresh, _, _ = long_addition(8)
    plan = plan_of(program_of(fresh, logits, sums, 8))
    monkeypatch.setattr(plan, "pieces", {})
    x = logits.detach().clone().requires_grad_()
    found = truth(fresh, x, sums, 8)
    pieces, heads = pieces_of(plan, frozenset([0]))
    assert [isinstance(piece, Piece) for piece in pieces] == [True, False, True]
    assert not heads
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    (own,) = torch.autograd.grad(found[:3].sum(), x)
    (other,) = torch.autograd.grad(expected[:3].sum(), logits)
    torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("remembered", [True, False])
def test_logits_of_autocast_are_normalised_in_float32(remembered: bool) -> None:
    net = nn.Linear(10, 10)
    digit = nesy.Categorical(net, range(10), name="digit")
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 6, 10, generator=generator)
    n = torch.randint(19, (6,), generator=generator)
    program = mnist_add.sentence(digit, 1)(*images.unbind(), nesy.observed(n))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = program.log_truth() if remembered else traced(program)
        logits = net(images)
    assert found.dtype == torch.float32
    log_p, log_q = logits.double().log_softmax(-1).unbind()
    pairs = (log_p.unsqueeze(2) + log_q.unsqueeze(1)).flatten(1)
    sums = (torch.arange(10).unsqueeze(1) + torch.arange(10)).flatten()
    expected = pairs.masked_fill(sums != n.unsqueeze(1), -math.inf).logsumexp(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 5])
def test_a_remembered_sentence_checks_the_rows_of_its_network(rows: int) -> None:
    """One row serves all; another number of rows is refused as by a program that is traced."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(10.0).expand(rows, 10)

    digit = nesy.Categorical(Constant(), range(10), name="digit")

    @nesy.do(static=True)
    def is_number(x: Tensor, n: Any) -> Generator[Any, Any, Any]:
        return (yield digit(x)) == n

    n = torch.tensor([0, 3, 9, 12])
    program = is_number(torch.zeros(4, 2), nesy.observed(n))
    if rows == 1:
        expected = torch.arange(10.0).log_softmax(0)[n.clamp_max(9)]
        expected[3] = -math.inf
        torch.testing.assert_close(program.log_truth(), expected)
    else:
        with pytest.raises(ValueError, match="have 4 rows per input, got 5"):
            program.log_truth()


@pytest.mark.parametrize("last", [2, 40])
def test_products_stand_between_two_circuits(last: int) -> None:
    """Also where the first circuit gives as many results as the program has values."""
    generator = torch.Generator().manual_seed(last)
    sizes = [(2, 40), (40, 40), (40, last)]
    tables = [torch.randn(s, generator=generator).double().log_softmax(-1) for s in sizes]
    start = nesy.Categorical(nn.Identity(), range(2), name="start")
    steps = [
        nesy.Conditional(t, range(k), range(n)) for t, (n, k) in zip(tables, sizes, strict=True)
    ]

    @nesy.do
    def walk(x: Tensor) -> Generator[Any, Any, Any]:
        state = yield start(x)
        for step in steps:
            state = yield step(state)
        return state

    x = torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    program = walk(x)
    plan = PLANS.get(program._traced(), Keys(), Query.VALUES)
    kinds = [isinstance(piece, Piece) for piece in pieces_of(plan, frozenset([0])).steps]
    assert kinds == ([True, False, True] if last == 2 else [True, False, False])
    expected = x.log_softmax(-1).exp()
    for table in tables:
        expected = expected @ table.exp()
    found = program.distribution().log_prob
    torch.testing.assert_close(found, expected.log(), rtol=1e-12, atol=1e-12)
    (own,) = torch.autograd.grad(found.sin().sum(), x)
    (other,) = torch.autograd.grad(expected.log().sin().sum(), x)
    torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_a_remembered_sentence_is_the_mean(n: int, dtype: torch.dtype) -> None:
    formula, logits, sums = long_addition(n, dtype)
    x, y = logits[:, :3].clone().requires_grad_(), logits[:, :3].clone().requires_grad_()
    found = nesy.loss(program_of(formula, x, sums[:3], n))
    expected = -step_by_step(program_of(formula, y, sums[:3], n)).mean()
    torch.testing.assert_close(found, expected)
    (own,) = torch.autograd.grad(found, x)
    (other,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(own, other)
    impossible = nesy.loss(program_of(formula, logits, sums, n))
    assert impossible == torch.inf
