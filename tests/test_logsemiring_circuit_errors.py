"""What circuits refuse: wrong arguments, and tables that no LogCircuit makes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.cli.benchmarks.logsemiring_circuits import addition
from sapwood.ops import CircuitSum, LogCircuit, Selector, log_circuit

COIN = CircuitSum([[(0,), (1,)]])

raw: Any = torch.ops.sapwood


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [], []), "inputs must be at least 0, got -1"),
        ((2, [COIN], [3]), r"results must name columns in \[0, 3\), got 3"),
        ((2, [COIN], [-1]), r"results must name columns in \[0, 3\), got -1"),
        ((2, [COIN, CircuitSum([[(3,)]])], []), r"factors of sum 1 .* in \[0, 3\), got 3"),
        ((2, [CircuitSum([[(1, -1)]])], []), r"factors of sum 0 .* in \[0, 2\), got -1"),
        ((2, [CircuitSum(np.array([[[0, 2]]]))], []), r"factors of sum 0 .* in \[0, 2\), got 2"),
        ((2, [CircuitSum([])], []), "lists of sum 0 must hold at least one list, got none"),
        (
            (2, [COIN, CircuitSum(np.zeros((2, 3), int))], []),
            r"lists of sum 1 must be an array \(lists, terms, at least one factor\), got shape \(2",
        ),
        (
            (2, [CircuitSum(np.zeros((1, 3, 0), int))], []),
            r"lists of sum 0 must be an array .* got shape \(1, 3, 0\)",
        ),
        (
            (2, [CircuitSum([[(0,)]], [Selector(0, 0, 2)])], []),
            "selectors of sum 0 must reach at most list 0, got 1",
        ),
        (
            (2, [CircuitSum([[]] * 3, [Selector(0, 0, 2), Selector(1, 5, 2, 2)])], []),
            "selectors of sum 0 must reach at most list 2, got 3",
        ),
        *(
            (
                (2, [CircuitSum([[(0,)]], [selector])], []),
                "selectors of sum 0 must have column >= 0, size >= 1 and stride >= 0, got Sel",
            )
            for selector in (Selector(-1, 0, 1), Selector(0, 0, 0), Selector(0, 0, 1, -1))
        ),
        (
            (2, [CircuitSum([[(0,)]], [Selector(0, 2**31, 1)])], []),
            r"all numbers must be smaller than 2\^31, got 2147483648",
        ),
        *(
            (
                (4, [], [], heads),
                rf"heads must be ranges of \[0, 4\) that do not overlap, got {got}",
            )
            for heads, got in (
                ([(2, 4), (0, 3)], r"\(2, 4\)"),
                ([(3, 2)], r"\(3, 2\)"),
                ([(0, 5)], r"\(0, 5\)"),
                ([(-1, 2)], r"\(-1, 2\)"),
            )
        ),
    ],
)
def test_circuits_that_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^sapwood\.LogCircuit: {message}"):
        LogCircuit(*arguments)


SEEN = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], SEEN), TypeError, "x must be a tensor, got list"),
        ((SEEN, SEEN), TypeError, "x must be floating point, got torch.int64"),
        ((torch.zeros(20), SEEN), ValueError, r"x must have 3 dimensions, got shape \(20,\)"),
        (
            (torch.zeros(3, 19), SEEN),
            ValueError,
            r"x must have 20 inputs for each row, as the circuit, got shape \(1, 3, 19\)",
        ),
        ((torch.zeros(3, 20),), ValueError, "evidence must be given for this circuit, got none"),
        ((torch.zeros(3, 20), [1]), TypeError, "evidence must be a tensor, got list"),
        (
            (torch.zeros(3, 20), SEEN.int()),
            TypeError,
            "evidence must be torch.int64, got torch.int32",
        ),
        *(
            (
                (torch.zeros(3, 20), SEEN.new_zeros(shape)),
                ValueError,
                rf"evidence must be \(3, at least 2\), got shape {got}",
            )
            for shape, got in (((3,), r"\(3,\)"), ((2, 2), r"\(2, 2\)"), ((3, 1), r"\(3, 1\)"))
        ),
        (
            (torch.zeros(3, 20), SEEN.to("meta")),
            RuntimeError,
            "x is on cpu but evidence is on meta",
        ),
    ],
)
def test_calls_that_are_refused(
    arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    x, *seen = arguments
    with pytest.raises(kind, match=rf"^sapwood\.log_circuit: {message}"):
        log_circuit(x, addition(1), *seen)


# Tables that no LogCircuit makes ------------------------------------------------------------------


def raw_calls(tables: Tensor, counts: list[int]) -> None:
    x = torch.zeros(2, 3, 10)
    raw.log_circuit(x, SEEN, tables, counts)
    raw.log_circuit_backward(torch.zeros(3, 1), x, SEEN, tables, counts)


def test_tables_of_another_length_are_refused() -> None:
    circuit = addition(1)
    tables = circuit.tables(torch.device("cpu"))
    raw_calls(tables, circuit.counts)
    for broken in (tables[:-1], torch.cat([tables, tables[:1]]), tables[None], tables.long()):
        with pytest.raises(RuntimeError, match=r"sapwood\.log_circuit: circuit must"):
            raw_calls(broken, circuit.counts)


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("value", [-1, 2**31, 1000])
def test_counts_that_are_wrong_are_refused(at: int, value: int) -> None:
    circuit = addition(1)
    counts = list(circuit.counts)
    counts[at] = value
    with pytest.raises(RuntimeError, match=r"sapwood\.log_circuit: "):
        raw_calls(circuit.tables(torch.device("cpu")), counts)


def test_a_wrong_number_of_counts_is_refused() -> None:
    circuit = addition(1)
    with pytest.raises(RuntimeError, match="counts must have 9 entries, got 8"):
        raw_calls(circuit.tables(torch.device("cpu")), circuit.counts[:-1])


def sections(circuit: LogCircuit) -> dict[str, tuple[int, int]]:
    """Where each table that the CPU reads begins and ends."""
    _, results, heads, selectors, sums, lists, terms, factors, _ = circuit.counts
    sizes = {
        "results": results, "heads": 2 * heads, "selector_ptr": sums + 1,
        "selectors": 4 * selectors, "list_ptr": sums + 1, "term_ptr": lists + 1,
        "factor_ptr": terms + 1, "factors": factors,
    }  # fmt: skip
    ends = list(itertools.accumulate(sizes.values(), initial=0))
    return {name: (ends[i], ends[i + 1]) for i, name in enumerate(sizes)}


@pytest.mark.parametrize("value", [-1, -(2**31), 10**6, 2**31 - 1])
@pytest.mark.parametrize("name", list(sections(addition(1))))
def test_broken_tables_are_refused(name: str, value: int) -> None:
    """Any entry out of range, but for the values of a selector: those cannot reach beyond."""
    circuit = addition(1)
    begin, end = sections(circuit)[name]
    for at in range(begin, end):
        tables = circuit.tables(torch.device("cpu")).clone()
        tables[at] = value
        field = (at - begin) % 4 if name == "selectors" else 0
        if name == "selectors" and (field == 1 or (field > 1 and value > 0)):
            raw_calls(tables, circuit.counts)  # selects no list, or another one
            continue
        with pytest.raises(RuntimeError, match="circuit must hold the tables of a LogCircuit"):
            raw_calls(tables, circuit.counts)


def test_pointers_that_fall_and_columns_to_the_right_are_refused() -> None:
    circuit = addition(1)
    for name in ("list_ptr", "term_ptr", "factor_ptr"):
        begin, end = sections(circuit)[name]
        tables = circuit.tables(torch.device("cpu")).clone()
        tables[begin + 1 : end - 1] = tables[begin + 1 : end - 1].flip(0)
        with pytest.raises(RuntimeError, match="circuit must hold the tables"):
            raw_calls(tables, circuit.counts)
    tables = circuit.tables(torch.device("cpu")).clone()
    tables[sections(circuit)["factors"][0]] = circuit.inputs  # the sum itself
    with pytest.raises(RuntimeError, match="circuit must hold the tables"):
        raw_calls(tables, circuit.counts)
