"""Extreme logits, impossible data, NaN, and additions of many digits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood import nesy
from sapwood.nesy import mnist_add

READER = nesy.Categorical(nn.Identity(), range(10), name="digit")


def log_truth(logits: Tensor, sums: Tensor) -> Tensor:
    """(B, 2, N, 10) logits and (B, N + 1) digits, or (B,) sums for N = 1."""
    n = logits.shape[2]
    xs, ys = (logits[:, :, 0] if n == 1 else logits).unbind(1)
    return mnist_add.sentence(READER, n)(xs, ys, nesy.observed(sums)).log_truth()


def digits_of(numbers: list[int], count: int) -> Tensor:
    return torch.tensor([[v // 10**i % 10 for i in range(count)] for v in numbers])


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("n", [1, 3, 15])
def test_extreme_logits_in_float32(n: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = scale * (2 * torch.rand(64, 2, n, 10, generator=generator) - 1)
    digits = torch.randint(10, (64, 2, n), generator=generator)
    sums = mnist_add.sum_digits(digits)
    sums = sums[:, 0] + 10 * sums[:, 1] if n == 1 else sums
    narrow, wide = logits.requires_grad_(), logits.detach().double().requires_grad_()
    found, expected = log_truth(narrow, sums), log_truth(wide, sums)
    scale_of = expected.abs().clamp(min=1.0)
    assert bool(((found - expected).abs() <= 1e-6 * scale_of).all())
    (grad,) = torch.autograd.grad(found.sum(), narrow)
    assert bool(grad.isfinite().all())
    probable = (found.exp() > 0) & (found.exp() < 1)
    assert bool((grad[probable].abs().flatten(1).amax(1) > 0).all())
    assert bool((grad.sum(-1).abs() <= 1e-5).all())  # posterior minus prior: both sum to 1


def test_one_hot_logits_of_ten_thousand() -> None:
    """Both digits certain and wrong for the sum: -2e4, not a floor, and a gradient to learn by."""
    logits = torch.full((1, 2, 1, 10), -1e4)
    logits[:, :, :, 0] = 1e4
    logits.requires_grad_()
    found = log_truth(logits, torch.tensor([18]))
    assert found.item() == pytest.approx(-4e4, rel=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0, 0, 9]) == pytest.approx(1.0)


def test_impossible_data() -> None:
    logits = torch.randn(3, 2, 1, 10, requires_grad=True)
    found = log_truth(logits, torch.tensor([19, -1, 4]))
    assert found[:2].tolist() == [-math.inf, -math.inf]
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert bool((grad[:2] == 0).all())
    assert bool(grad[2].isfinite().all())
    many = torch.randn(2, 2, 4, 10, requires_grad=True)
    carry = torch.tensor([[1, 2, 3, 4, 7], [1, 2, 3, 4, 1]])
    found = log_truth(many, carry)
    assert found[0] == -math.inf
    (grad,) = torch.autograd.grad(found.sum(), many)
    assert bool((grad[0] == 0).all())
    assert bool((grad[1] != 0).any())


def test_nan_is_not_hidden() -> None:
    logits = torch.randn(2, 2, 2, 10)
    logits[0, 0, 0, 3] = math.nan
    found = log_truth(logits, torch.tensor([[1, 1, 0], [1, 1, 0]]))
    assert found.isnan().tolist() == [True, False]


def test_logits_of_minus_infinity() -> None:
    logits = torch.full((1, 2, 1, 10), -math.inf)
    logits[:, :, :, 2:4] = 0.0
    logits.requires_grad_()
    found = log_truth(logits, torch.tensor([5]))
    assert found.exp().item() == pytest.approx(0.5)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert bool(grad.isfinite().all())


def test_two_digits_against_enumeration_and_convolution() -> None:
    logits = torch.randn(3, 2, 2, 10, dtype=torch.float64)
    numbers = [0, 97, 198]
    found = log_truth(logits, digits_of(numbers, 3)).exp()
    p = logits.softmax(-1)
    values = (p[:, :, 1, :, None] * p[:, :, 0, None, :]).flatten(2)  # (B, 2, 100)
    joint = values[:, 0, :, None] * values[:, 1, None, :]
    total = torch.arange(100)[:, None] + torch.arange(100)
    expected = [joint[i][total == v].sum() for i, v in enumerate(numbers)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)


def test_four_digits_against_the_convolution() -> None:
    import numpy as np

    logits = torch.randn(2, 2, 4, 10, dtype=torch.float64)
    numbers = [12345, 19990]
    found = log_truth(logits, digits_of(numbers, 5)).exp()
    for row, number in enumerate(numbers):
        parts = []
        for p in logits[row].softmax(-1).numpy():
            values = np.ones(1)
            for digit in p[::-1]:
                values = (values[:, None] * digit[None, :]).ravel()
            parts.append(values)
        assert found[row].item() == pytest.approx(np.convolve(*parts)[number], rel=1e-12)


def test_fifteen_digits_against_rational_carries() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (2, 2, 15, 10), generator=generator)
    digits = torch.randint(10, (2, 2, 15), generator=generator)
    sums = mnist_add.sum_digits(digits)
    for row in range(2):
        p = [
            [[Fraction(int(w), int(ws.sum())) for w in ws] for ws in number]
            for number in weights[row]
        ]
        state = {0: Fraction(1)}
        for i in range(15):
            following: dict[int, Fraction] = {}
            for carry, mass in state.items():
                for a in range(10):
                    b = int(sums[row, i]) - carry - a
                    for b_digit in (b % 10,):
                        total = a + b_digit + carry
                        term = mass * p[0][i][a] * p[1][i][b_digit]
                        following[total // 10] = following.get(total // 10, Fraction(0)) + term
            state = following
        exact = state.get(int(sums[row, 15]), Fraction(0))
        expected = math.log(exact.numerator) - math.log(exact.denominator)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            logits = weights[row : row + 1].to(dtype).log()
            found = log_truth(logits, sums[row : row + 1]).item()
            assert found == pytest.approx(expected, rel=tolerance)


def test_fifteen_uniform_digits() -> None:
    """n = 10^15 - 1: 10^15 of 10^30 pairs, a log of -34.538776 that no floor may hide."""
    found = log_truth(torch.zeros(1, 2, 15, 10), digits_of([10**15 - 1], 16))
    assert found.item() == pytest.approx(-34.538776, rel=1e-6)


def test_second_derivatives() -> None:
    def call(logits: Tensor) -> Any:
        return log_truth(logits, torch.tensor([[3, 1, 0], [9, 8, 1]]))

    logits = torch.randn(2, 2, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (logits,))
    assert torch.autograd.gradgradcheck(call, (logits,))


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_batches_of_any_size(n: int) -> None:
    """No rows, one row, expanded and strided rows."""
    logits = torch.randn(5, 2, n, 10)
    sums = mnist_add.sum_digits(torch.randint(10, (5, 2, n)))
    sums = sums[:, 0] + 10 * sums[:, 1] if n == 1 else sums
    whole = log_truth(logits, sums)
    assert log_truth(logits[:0], sums[:0]).shape == (0,)
    torch.testing.assert_close(log_truth(logits[3:4], sums[3:4]), whole[3:4])
    torch.testing.assert_close(log_truth(logits[::2], sums[::2]), whole[::2])
    same = log_truth(logits[:1].expand(4, -1, -1, -1), sums[:1].expand(4, *sums.shape[1:]))
    torch.testing.assert_close(same, whole[:1].expand(4))
    empty = logits[:0].clone().requires_grad_()
    log_truth(empty, sums[:0]).sum().backward()
    assert empty.grad is not None


def test_bfloat16_networks() -> None:
    """The log probabilities have the network's type; float64 is a program's own choice."""
    logits = torch.randn(4, 2, 2, 10).bfloat16()
    sums = mnist_add.sum_digits(torch.randint(10, (4, 2, 2)))
    narrow = log_truth(logits, sums)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), log_truth(logits.float(), sums), rtol=0.05, atol=0.1)
    formula = mnist_add.sentence(READER, 2)
    wide = formula(*logits.unbind(1), nesy.observed(sums)).double().log_truth()
    torch.testing.assert_close(wide, log_truth(logits.double(), sums))
