"""Circuits for the tests: additions of digits, and any circuit at random."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sapwood.ops import CircuitSum, LogCircuit, Selector


def addition(digits: int, base: int = 10) -> LogCircuit:
    """The mass of a sum of two numbers, given by its digits, least significant first.

    Inputs are the heads of all digits in turn (2 * digits, base); the evidence has digits + 1 columns.
    """
    inputs = 2 * digits * base
    sums: list[CircuitSum] = []
    carries: list[int] = []  # columns of "no carry" and "carry" so far
    for position in range(digits):
        first, second = 2 * position * base, (2 * position + 1) * base
        before = list(enumerate(carries)) or [(0, -1)]
        known = Selector(position, 0, base)
        for out in (0, 1):
            lists = [
                [
                    tuple(f for f in (first + a, second + b, column) if f >= 0)
                    for a, b in itertools.product(range(base), repeat=2)
                    for carry, column in before
                    if a + b + carry == digit + base * out
                ]
                for digit in range(base)
            ]
            sums.append(CircuitSum(lists, [known]))
        carries = [inputs + len(sums) - 2, inputs + len(sums) - 1]
    sums.append(CircuitSum([[(carries[0],)], [(carries[1],)]], [Selector(digits, 0, 2)]))
    heads = [(i * base, (i + 1) * base) for i in range(2 * digits)]
    return LogCircuit(inputs, sums, [inputs + len(sums) - 1], heads)


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
