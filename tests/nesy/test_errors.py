"""Every documented error, word by word where it matters."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import nn

from sapwood import nesy

DIGIT = nesy.Categorical(nn.Linear(3, 4), range(4), name="digit")
X = torch.randn(2, 3)


def run(body: Any) -> nesy.Program:
    return nesy.do(body)()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nesy.uniform([]), "support must have at least one value, got none"),
        (lambda: nesy.uniform([1, 1]), "support must have distinct values, got (1, 1)"),
        (lambda: nesy.choice({0: 0.5, 1: 0.6}), "probabilities must be >= 0 and sum to 1"),
        (lambda: nesy.choice({0: 1.5, 1: -0.5}), "probabilities must be >= 0 and sum to 1"),
        (
            lambda: nesy.Conditional(torch.zeros(2, 2), [0, 1], [0, 1]),
            "table must have rows of mass 1 (log 0), got 0.69",
        ),
        (
            lambda: nesy.Conditional(torch.zeros(1, 2), [0, 1], [0, 1]),
            "table must have shape (2, 2), got (1, 2)",
        ),
        (lambda: nesy.observed(torch.tensor(3)), "values must have shape (B, ...), got shape ()"),
        (
            lambda: nesy.continuous(torch.distributions.Normal(torch.zeros(2), 1.0)),
            "distribution must be of one number, got (2,)",
        ),
        (
            lambda: nesy.Categorical(nn.Linear(3, 5), range(4), name="d")(X) and
            nesy.fmap(lambda d: d == 1, nesy.Categorical(nn.Linear(3, 5), range(4), name="d")(X))
            .log_truth(),
            "sapwood.nesy.d: net's output must have shape (B, 4), got (2, 5)",
        ),
        (
            lambda: nesy.fmap(lambda d: d == 1, nesy.uniform([1])).log_truth("posterior"),
            "normalize must be one of prior, evidence, none, got 'posterior'",
        ),
    ],
)  # fmt: skip
def test_wrong_values(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"sapwood\.nesy") as error:
        call()
    assert message in str(error.value)


def test_batch_sizes_must_agree() -> None:
    n = nesy.observed(torch.zeros(3, dtype=torch.long))
    program = nesy.fmap(lambda d: d == n, DIGIT(X))
    for call in (program.log_truth, lambda: program.truth(nesy.Dist)):
        with pytest.raises(ValueError, match="observed values must have batch size 2, got 3"):
            call()


def test_columns_must_be_sliced() -> None:
    n = nesy.observed(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must have one column, shape \(B,\), got \(2, 3\)"):
        nesy.fmap(lambda d: d == n, DIGIT(X)).log_truth()
    with pytest.raises(TypeError, match="values must be a tensor, got list"):
        nesy.observed([1, 2])  # type: ignore[arg-type]


def test_branches_on_data() -> None:
    n = nesy.observed(torch.tensor([0, 1]))

    def body() -> Generator[Any, Any, Any]:
        d = yield DIGIT(X)
        return d == 0 if n > 0 else d == 1

    with pytest.raises(nesy.TraceError, match=r"not depend on observed data .*test_errors.py:"):
        run(body).log_truth()
    assert run(body).truth(nesy.Dist).shape == (2,)  # rows one by one may branch


def test_too_many_paths() -> None:
    @nesy.do(max_paths=20)
    def many() -> Generator[Any, Any, Any]:
        total = 0
        for _ in range(8):
            total += int((yield nesy.uniform(range(3))))
        return total == 3

    with pytest.raises(nesy.TraceError, match="at most max_paths=20 paths"):
        many().log_truth()


def test_wrong_yields_name_the_line() -> None:
    def body() -> Generator[Any, Any, Any]:
        yield 3
        return True

    with pytest.raises(nesy.TraceError, match=r"test_errors.py:\d+\), got int"):
        run(body).log_truth()


def test_errors_of_user_code_come_through() -> None:
    def body() -> Generator[Any, Any, Any]:
        yield DIGIT(X)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(body).log_truth()


def test_undefined_arithmetic() -> None:
    def body() -> Generator[Any, Any, Any]:
        d = yield DIGIT(X)
        return 6 // d == 3

    with pytest.raises(nesy.TraceError, match="// must be defined on all values"):
        run(body).log_truth()


def test_values_outside_their_program() -> None:
    kept: list[Any] = []

    def body() -> Generator[Any, Any, Any]:
        kept.append((yield DIGIT(X)))
        return kept[0] == 1

    run(body).log_truth()
    with pytest.raises(nesy.TraceError, match="must stay inside its program"):
        bool(kept[0] == 1)

    def other() -> Generator[Any, Any, Any]:
        d = yield nesy.uniform(range(4))
        return d == kept[0]

    with pytest.raises(nesy.TraceError, match="must stay inside its program"):
        run(other).log_truth()


def test_parents_outside_the_support() -> None:
    after = nesy.Conditional(torch.zeros(2, 1), [0], [0, 1], name="after")

    def body() -> Generator[Any, Any, Any]:
        d = yield nesy.uniform(range(3))
        return (yield after(d)) == 0

    for call in (run(body).log_truth, lambda: run(body).truth(nesy.Dist)):
        with pytest.raises(ValueError, match=r"parent must be one of \{0, 1\}, got '?2"):
            call()


def test_unsupported_operations() -> None:
    guarded = nesy.bind(nesy.uniform([0, 1]), lambda a: nesy.unit(a == 0))
    assert guarded.truth(nesy.Dist).item() == pytest.approx(0.5)
    with pytest.raises(nesy.UnsupportedMonadError, match="Dist must have a guard, it has none"):
        nesy.Dist.zero()
    with pytest.raises(nesy.UnsupportedMonadError, match="nondeterministic choice"):
        nesy.fmap(lambda v: v == 1, nesy.nondet([1, 2])).truth(nesy.Dist)
    with pytest.raises(nesy.UnsupportedMonadError, match="finite distributions"):
        nesy.fmap(lambda v: v == 1, nesy.nondet([1, 2])).log_truth()

    def impossible() -> Generator[Any, Any, Any]:
        a = yield nesy.uniform([0, 1])
        yield nesy.guard(a > 3)
        return a == 0

    with pytest.raises(nesy.UnsupportedMonadError, match="guards left none"):
        run(impossible).truth(nesy.Dist)
    assert run(impossible).log_truth() == -torch.inf
    assert run(impossible).log_truth("evidence") == -torch.inf


def test_only_sentences_have_a_truth() -> None:
    with pytest.raises(TypeError, match="program must return a truth value"):
        nesy.fmap(lambda d: d + 1, nesy.uniform([1, 2])).log_truth()
