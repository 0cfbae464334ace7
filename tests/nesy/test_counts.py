"""What is computed, and how often: networks, plans, runs of the generator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood import nesy
from sapwood.nesy import mnist_add, static
from sapwood.nesy.plan import PLANS, PlanCache, Query
from sapwood.nesy.trace import Keys


class Counted(nn.Module):
    """A network that counts its calls and rows."""

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(4, k)
        self.calls = 0
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        found: Tensor = self.linear(x)
        return found


@pytest.mark.parametrize("n", [1, 2, 4, 15])
def test_one_call_per_symbol(n: int) -> None:
    net = Counted()
    formula = mnist_add.sentence(nesy.Categorical(net, range(10), name="digit"), n)
    xs, ys = torch.randn(2, 5, n, 4)
    sums = mnist_add.sum_digits(torch.randint(10, (5, 2, n)))
    data = (xs[:, 0], ys[:, 0], sums[:, 0]) if n == 1 else (xs, ys, sums)
    before = PLANS.compiled
    for _ in range(3):
        formula(data[0], data[1], nesy.observed(data[2])).log_truth()
    assert (net.calls, net.rows) == (3, 3 * 2 * n * 5)
    assert PLANS.compiled - before <= 1


def test_unused_draws_are_not_evaluated() -> None:
    used, unused = Counted(), Counted()
    first = nesy.Categorical(used, range(10))
    second = nesy.Categorical(unused, range(10))
    x = torch.randn(3, 4)

    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        a, b = (yield first(x)), (yield second(x))
        c = yield second(x)
        return (a == 3) & ((b + c) * 0 == 0) if False else a == 3

    run().log_truth()
    assert (used.calls, unused.calls) == (1, 0)


def test_both_paths_share_one_evaluation() -> None:
    net = Counted()
    digit = nesy.Categorical(net, range(10))
    x, y = torch.randn(2, 3, 4)

    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        a = yield digit(x)
        b = yield (digit(y) if a < 5 else nesy.uniform([0]))
        return a + b == 3

    run().log_truth()
    assert (net.calls, net.rows) == (1, 6)


def test_runs_of_the_generator() -> None:
    class Counter:
        runs = 0

    def body(x: Tensor, n: Any) -> Generator[Any, Any, Any]:
        Counter.runs += 1
        d = yield digit(x)
        return d == n

    digit = nesy.Categorical(nn.Linear(4, 10), range(10))
    x, n = torch.randn(3, 4), nesy.observed(torch.tensor([1, 2, 3]))
    traced, static = nesy.do(body), nesy.do(static=True)(body)
    first, *_ = [traced(x, n).log_truth() for _ in range(3)]
    assert Counter.runs == 3
    Counter.runs = 0
    other = torch.randn(3, 4)
    again = [static(v, n).log_truth() for v in (x, other, x)]
    assert Counter.runs == 1
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], traced(other, n).log_truth())


def test_static_programs_follow_slices_shapes_and_closures() -> None:
    digit = nesy.Categorical(nn.Linear(4, 10), range(10))

    def make(shift: int) -> Any:
        @nesy.do(static=True)
        def run(xs: Tensor, n: Any) -> Generator[Any, Any, Any]:
            total = shift
            for i in range(xs.shape[1]):
                total = total + (yield digit(xs[:, i]))
            return total == n

        return run

    for shift in (0, 1, 0):
        for shape in ((3, 2, 4), (3, 1, 4), (5, 2, 4)):
            for _ in range(2):
                xs = torch.randn(shape)
                n = torch.randint(0, 19, (shape[0],))
                found = make(shift)(xs, nesy.observed(n)).log_truth()
                expected = nesy.program.Program(
                    make(shift)._function, (xs, nesy.observed(n))
                ).log_truth()
                assert torch.equal(found, expected)


def test_static_programs_tell_arguments_of_one_memory_apart() -> None:
    """Learnt on two views of one tensor, then called with two tensors; gradients reach both."""
    digit = nesy.Categorical(nn.Identity(), range(10))

    @nesy.do(static=True)
    def run(x: Tensor, y: Tensor, n: Any) -> Generator[Any, Any, Any]:
        return (yield digit(x)) - (yield digit(y)) == n

    n = nesy.observed(torch.tensor([0, 3]))
    both = torch.randn(2, 2, 10, requires_grad=True)
    for x, y in (both.unbind(1), (both[:, 0], torch.randn(2, 2, 10)[:, 1])):
        p, q = x.softmax(-1), y.softmax(-1)
        expected = torch.stack([(p[0] * q[0]).sum(), (p[1, 3:] * q[1, :7]).sum()])
        found = run(x, y, n).log_truth()
        torch.testing.assert_close(found.exp(), expected)
        (grad,) = torch.autograd.grad(found.sum(), both, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.log().sum(), both)
        torch.testing.assert_close(grad, wanted)


def test_static_programs_that_compute_inputs_are_traced(caplog: pytest.LogCaptureFixture) -> None:
    digit = nesy.Categorical(nn.Linear(4, 10), range(10))

    @nesy.do(static=True)
    def run(x: Tensor) -> Generator[Any, Any, Any]:
        return (yield digit(x * 2)) == 1

    x = torch.randn(3, 4)
    with caplog.at_level(logging.WARNING, "sapwood.nesy"):
        first, second = run(x).log_truth(), run(x + 1).log_truth()
    assert not torch.equal(first, second)
    assert len(caplog.records) == 1
    assert "reads something else than slices of its arguments" in caplog.text


def test_changed_closures_and_tables_meet_no_stale_plan() -> None:
    contents = [0, 1, 0]

    @nesy.do
    def run() -> Generator[Any, Any, Any]:
        d = yield nesy.uniform(range(3))
        return nesy.table(contents)[d] == 1

    assert run().log_truth().exp().item() == pytest.approx(1 / 3)
    contents[0] = 1
    assert run().log_truth().exp().item() == pytest.approx(2 / 3)


def test_dead_paths_are_not_explored() -> None:
    """Ten exclusive cases of one variable make ten paths, not 2^10."""

    @nesy.do
    def cases() -> Generator[Any, Any, Any]:
        d = yield nesy.uniform(range(10))
        for v in range(9):
            if d == v:
                return nesy.table(range(10))[d] == v
        return d == 9

    traced = cases()._traced()
    assert len(traced.paths) == 10
    assert traced.runs == 10
    assert cases().log_truth().exp().item() == pytest.approx(1.0)


EXPLAINED = """\
variables:
  digit[0] in {0..9}
  digit[1] in {0..9}
  digit[2] in {0..9}
  digit[3] in {0..9}
where:
  t1 = ((digit[2] + digit[3]) + (((digit[0] + digit[1]) + 0) // 10))
evidence:
  (((digit[0] + digit[1]) + 0) % 10) = data[0]
  (t1 % 10) = data[1]
  (t1 // 10) = data[2]
steps:
  1. sum out digit[0], digit[1] -> (((digit[0] + digit[1]) + 0) // 10): 20 terms, listed entries, \
log_circuit
  2. sum out digit[2], digit[3], (digit[2] + digit[3]) -> (((digit[0] + digit[1]) + 0) // 10): \
20 terms, listed entries, log_circuit
  3. sum out (((digit[0] + digit[1]) + 0) // 10): 2 terms, listed entries, log_circuit
total: 42 terms per row in 3 grouped operations
network calls: digit once, 4 inputs per row"""


def test_explanation() -> None:
    formula = mnist_add.sentence(nesy.Categorical(Counted(), range(10), name="digit"), 2)
    xs, ys = torch.randn(2, 5, 2, 4)
    program = formula(xs, ys, nesy.observed(torch.zeros(5, 3, dtype=torch.long)))
    assert program.explain() == EXPLAINED


def test_long_additions_stay_small() -> None:
    """The joint of four digits has 1e8 entries; no step of the plan has more than 100."""
    formula = mnist_add.sentence(nesy.Categorical(Counted(), range(10)), 4)
    xs, ys = torch.randn(2, 5, 4, 4)
    program = formula(xs, ys, nesy.observed(torch.zeros(5, 5, dtype=torch.long)))
    with pytest.raises(ValueError, match="at most 1e8 entries, got 5 x 100000000"):
        program.log_truth(strict=True)
    terms = [
        int(line.split(":")[1].split()[0])
        for line in program.explain().splitlines()
        if " terms, " in line
    ]
    assert max(terms) <= 100


def fastest(call: Callable[[], object], rounds: int = 30) -> float:
    """Seconds of CPU time, so that other work on the machine does not count."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def test_planning_takes_little_time() -> None:
    """A plan of N = 15 at most 50 ms, a cached one 150 us with its trace, 50 us without."""
    digit = nesy.Categorical(Counted(), range(10), name="digit")
    xs, ys = torch.randn(2, 5, 15, 4)
    sums = nesy.observed(torch.zeros(5, 16, dtype=torch.long))
    traced = mnist_add.sentence(digit, 15)(xs, ys, sums)._traced()
    cache = PlanCache(most=0)  # forgets at once
    assert fastest(lambda: cache.get(traced, Keys(), Query.TRUTH), rounds=10) <= 0.05

    program = mnist_add.sentence(digit, 1)(xs[:, 0], ys[:, 0], sums[:, 0])
    program.log_truth()
    assert fastest(lambda: PLANS.get(program._traced(), Keys(), Query.TRUTH)) <= 150e-6
    key = static._read(program)[0]
    assert static._known[key] is not None
    assert fastest(lambda: static._known[static._read(program)[0]]) <= 50e-6
