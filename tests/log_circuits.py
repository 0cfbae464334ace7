"""Circuits for the tests, at random, and evidence for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood.cli.benchmarks.logsemiring_circuits import addition
from sapwood.ops import CircuitSum, LogCircuit, Selector


def anything(seed: int, inputs: int, sums: int, most: int = 5) -> tuple[LogCircuit, int]:
    """A circuit with lists and terms of all lengths, and how many columns of evidence it has."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    columns = 2
    built: list[CircuitSum] = []
    for j in range(sums):
        selectors = [
            Selector(number(0, columns - 1), number(-2, 2), number(1, 3), number(0, 2))
            for _ in range(number(0, 2))
        ]
        lists = 1 + sum((s.size - 1) * s.stride for s in selectors) + number(0, 1)
        most_factors = 3 if inputs + j else 0
        terms = [
            [
                [number(0, inputs + j - 1) for _ in range(number(0, most_factors))]
                for _ in range(number(0, most))
            ]
            for _ in range(lists)
        ]
        built.append(CircuitSum(terms, selectors))
    half = inputs // 2
    heads = [(0, half), (half, half)] if number(0, 1) else []
    every = inputs + sums
    results = [number(0, every - 1) for _ in range(number(0, 3))] if every else []
    return LogCircuit(inputs, built, results, heads), columns


def evidence(seed: int, rows: int, columns: int) -> Tensor:
    """(B, E) values, of which some are not known."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 6, (rows, columns), generator=g)


def arguments(
    circuit: LogCircuit, rows: int, blocks: int, seen: Tensor | None, seed: int = 0
) -> tuple[Any, ...]:
    """x (m, B, k), evidence, tables and counts."""
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(blocks, rows, circuit.inputs // blocks, generator=g)
    return x, seen, circuit.tables(x.device), circuit.counts


def sums_of(rows: int, digits: int) -> Tensor:
    """Digits of sums; the last row has none."""
    numbers = torch.randint(10, (rows, digits + 1), generator=torch.Generator().manual_seed(rows))
    numbers[:, -1] %= 2
    numbers[-1:, 0] = 10
    return numbers


def samples() -> list[tuple[str, tuple[Any, ...]]]:
    """Names and arguments of calls: a small one, an addition, none of something, and any."""
    small = LogCircuit(
        6, [CircuitSum([[(0, 2), (1, 3), (4,)], [()]], [Selector(0, 3, 2)])],
        [6, 0], heads=[(0, 2), (2, 4)],
    )  # fmt: skip
    seen = torch.tensor([[3], [3]])
    found = [
        ("main", arguments(small, 2, 2, seen)),
        ("three digits", arguments(addition(3), 40, 6, sums_of(40, 3))),
        ("no rows", arguments(addition(1), 0, 2, sums_of(0, 1)[:0])),
        ("no inputs", arguments(LogCircuit(0, [], []), 3, 1, None)),
    ]
    for seed, (inputs, sums) in enumerate([(1, 1), (3, 4), (9, 12), (0, 3), (4, 0), (30, 40)]):
        circuit, columns = anything(seed, inputs, sums)
        seen = evidence(seed, 3, columns)
        found.append((f"{inputs} inputs, {sums} sums", arguments(circuit, 3, 1, seen, seed)))
    return found
