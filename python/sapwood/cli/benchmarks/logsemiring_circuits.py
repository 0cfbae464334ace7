"""Additions of two numbers as a circuit, and as the carry chains that one writes in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sapwood.nesy.mnist_add import sum_digits
from sapwood.ops import CircuitSum, LogCircuit, Selector, log_circuit

#: Logits (2 digits, B, base) and sums (B, digits + 1) in, logarithms of probabilities (B, 1) out.
Adder = Callable[[Tensor, Tensor], Tensor]
_NONE = -1e30  # torch.logsumexp has gradient NaN where all terms are -inf


def addition(digits: int, base: int = 10) -> LogCircuit:
    """The mass of a sum of two numbers, given by its digits, least significant first.

    Args:
        digits: n, of each number.
        base: of its digits.

    Returns:
        The circuit: its inputs are the logits of the first and second number's digits in turn,
        (2 n, B, base), its evidence the sums (B, n + 1).
    """
    inputs = 2 * digits * base
    sums: list[CircuitSum] = []
    carries: list[int] = []  # columns of "no carry" and "carry" so far
    for position in range(digits):
        for out in (0, 1):
            lists = [_terms(digit + base * out, position, base, carries) for digit in range(base)]
            sums.append(CircuitSum(lists, [Selector(position, 0, base)]))
        carries = [inputs + len(sums) - 2, inputs + len(sums) - 1]
    sums.append(CircuitSum([[(carry,)] for carry in carries], [Selector(digits, 0, 2)]))
    heads = [(i * base, (i + 1) * base) for i in range(2 * digits)]
    return LogCircuit(inputs, sums, [inputs + len(sums) - 1], heads)


def _terms(total: int, position: int, base: int, carries: list[int]) -> list[tuple[int, ...]]:
    """All (first digit, second digit, carry) that add up to a total; no carry at the first."""
    first, second = 2 * position * base, (2 * position + 1) * base
    factors: list[tuple[int, tuple[int, ...]]] = [(c, (f,)) for c, f in enumerate(carries)]
    return [
        (first + a, second + total - carry - a, *column)
        for a, (carry, column) in itertools.product(range(base), factors or [(0, ())])
        if 0 <= total - carry - a < base
    ]


def sums(rows: int, digits: int, base: int, generator: torch.Generator) -> Tensor:
    """(B, n + 1) digits of sums of two random numbers, least significant first."""
    return sum_digits(torch.randint(base, (rows, 2, digits), generator=generator), base)


def _circuit(digits: int, base: int) -> Adder:
    circuit = addition(digits, base)
    return lambda x, seen: log_circuit(x, circuit, seen)


def _loop(digits: int, base: int) -> Adder:
    """A step for each digit: all (first, second, carry) that show it, the others masked."""
    totals = torch.arange(base)[:, None, None] + torch.arange(base)[:, None] + torch.arange(2)

    def add(x: Tensor, seen: Tensor) -> Tensor:
        p, here = torch.log_softmax(x, 2), totals.to(x.device)
        carry = p.new_tensor([0.0, _NONE]).expand(x.shape[1], 2)
        for position in range(digits):
            first, second = p[2 * position, :, :, None, None], p[2 * position + 1, :, None, :, None]
            terms = first + second + carry[:, None, None, :]
            shown = here % base == seen[:, position, None, None, None]
            outs = [
                torch.where(shown & (here // base == out), terms, -torch.inf).flatten(1)
                for out in (0, 1)
            ]
            carry = torch.logsumexp(torch.stack(outs, 1), 2)
        return carry.gather(1, seen[:, digits:])

    return add


def _gather(digits: int, base: int) -> Adder:
    """The same with the second digit that follows from the first, the carry and the digit shown."""
    lowest = torch.arange(base)[:, None] + torch.arange(2)  # (first, carry)

    def add(x: Tensor, seen: Tensor) -> Tensor:
        p, low = torch.log_softmax(x, 2), lowest.to(x.device)
        carry = p.new_tensor([0.0, _NONE]).expand(x.shape[1], 2)
        for position in range(digits):
            first, second = p[2 * position], p[2 * position + 1]
            digit = (seen[:, position, None, None] - low) % base
            given = second.gather(1, digit.flatten(1)).view(digit.shape)
            terms = first[:, :, None] + given + carry[:, None, :]
            carries_on = low + digit >= base
            outs = torch.stack([~carries_on, carries_on], 1)
            carry = torch.where(outs, terms[:, None], -torch.inf).flatten(2).logsumexp(2)
        return carry.gather(1, seen[:, digits:])

    return add


#: provider -> what makes an adder for a number of digits and a base.
PROVIDERS: dict[str, Callable[[int, int], Adder]] = {
    "loop": _loop,
    "gather": _gather,
    "sapwood": _circuit,
}

__all__ = ["PROVIDERS", "addition", "sums"]
