"""Centred kernel alignment: values, invariances, bias, minibatches, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood import ops
from sapwood.ops.similarity import _cka
from sapwood.reference import similarity as reference


def pair(n: int, d1: int, d2: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + d1)
    x = torch.randn(n, d1, generator=generator, dtype=torch.float64) + 3
    mixing = torch.randn(d1, d2, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d2, generator=generator, dtype=torch.float64)
    return x, x @ mixing + 2 * noise


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "d1", "d2"), [(50, 7, 5), (6, 20, 30), (700, 3, 4), (400, 300, 130)])
def test_linear_cka_is_the_definition(n: int, d1: int, d2: int, debiased: bool) -> None:
    x, y = pair(n, d1, d2)
    wanted = reference.linear_cka(x, y, debiased)
    torch.testing.assert_close(ops.linear_cka(x, y, debiased=debiased), wanted, rtol=0, atol=1e-10)
    single = ops.linear_cka(x.float(), y.float(), debiased=debiased)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("debiased", [False, True])
def test_feature_space_and_gram_form_agree(debiased: bool) -> None:
    x, y = pair(40, 6, 9)
    for a, b in zip(
        _cka._feature_terms(x, y, debiased), _cka._gram_terms(x, y, debiased), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


@pytest.mark.parametrize("debiased", [False, True])
def test_invariances(debiased: bool) -> None:
    x, y = pair(60, 8, 5)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    base = ops.linear_cka(x, y, debiased=debiased)
    moved = ops.linear_cka(-3 * x @ rotation + 100, 0.01 * y - 7, debiased=debiased)
    torch.testing.assert_close(moved, base, rtol=1e-8, atol=1e-10)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(ops.linear_cka(x, x @ rotation, debiased=debiased), one)
    torch.testing.assert_close(ops.linear_cka(x, x, debiased=debiased), one)


def test_only_the_debiased_estimate_is_zero_for_noise() -> None:
    biased, debiased = [], []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(200, 300, generator=generator) for _ in range(2))
        biased.append(float(ops.linear_cka(x, y)))
        debiased.append(float(ops.linear_cka(x, y, debiased=True)))
    assert abs(sum(debiased) / 100) <= 0.02
    assert sum(biased) / 100 > 0.4


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 7, 64])
def test_kernel_cka(debiased: bool, batch: int | None) -> None:
    x, y = pair(30, 4, 6)

    def gram(t: Tensor, width: float) -> Tensor:
        return torch.exp(-(torch.cdist(t, t) ** 2) / (2 * width**2))

    k, m = gram(x, 2.5), gram(y, 2.5)
    wanted = (
        reference.hsic(k, m, debiased)
        / (reference.hsic(k, k, debiased) * reference.hsic(m, m, debiased)).sqrt()
    )
    got = ops.kernel_cka(x, y, bandwidth=2.5, debiased=debiased, batch=batch)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    linear = ops.kernel_cka(x, y, kernel="linear", debiased=debiased)
    torch.testing.assert_close(linear, ops.linear_cka(x, y, debiased=debiased))


def test_median_bandwidth_does_not_depend_on_scale() -> None:
    x, y = pair(50, 4, 6)
    torch.testing.assert_close(ops.kernel_cka(x, y), ops.kernel_cka(10 * x, 0.1 * y))


def layers(n: int) -> tuple[list[Tensor], list[Tensor]]:
    x, y = pair(n, 6, 4)
    return [x, x.relu(), x**2], [y, y.tanh()]


@pytest.mark.parametrize("debiased", [False, True])
def test_one_batch_in_the_accumulator_is_the_direct_value(debiased: bool) -> None:
    xs, ys = layers(80)
    accumulator = ops.CKAAccumulator(3, 2, debiased=debiased)
    accumulator.update(xs, ys)
    wanted = torch.stack(
        [torch.stack([ops.linear_cka(x, y, debiased=debiased) for y in ys]) for x in xs]
    )
    torch.testing.assert_close(accumulator.compute(), wanted)
    own = ops.CKAAccumulator(3, debiased=debiased)
    own.update(xs)
    matrix = own.compute()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3, dtype=torch.float64))


def test_merged_accumulators_have_seen_everything() -> None:
    xs, ys = layers(120)
    whole, first, second = (ops.CKAAccumulator(3, 2) for _ in range(3))
    for at in range(0, 120, 30):
        batch = [t[at : at + 30] for t in xs], [t[at : at + 30] for t in ys]
        whole.update(*batch)
        (first if at < 60 else second).update(*batch)
    restored = ops.CKAAccumulator(3, 2)
    restored.load_state_dict(first.state_dict())
    restored.merge(second)
    torch.testing.assert_close(restored.compute(), whole.compute(), rtol=1e-12, atol=0)
    assert not torch.equal(first.compute(), whole.compute())


def test_accumulator_errors() -> None:
    xs, ys = layers(20)
    accumulator = ops.CKAAccumulator(3, 2)
    with pytest.raises(ValueError, match=r"update: xs must hold 3 layers, got 2"):
        accumulator.update(xs[:2], ys)
    with pytest.raises(ValueError, match=r"update: ys must hold 2 layers, got none"):
        accumulator.update(xs)
    with pytest.raises(ValueError, match=r"merge: other must be made as \(3, 2, True\)"):
        accumulator.merge(ops.CKAAccumulator(3, 2, debiased=False))


@pytest.mark.parametrize("debiased", [False, True])
def test_gradients(debiased: bool) -> None:
    x, y = (t.clone().requires_grad_() for t in pair(8, 3, 2))
    assert torch.autograd.gradcheck(lambda a, b: ops.linear_cka(a, b, debiased=debiased), (x, y))
    assert torch.autograd.gradcheck(
        lambda a, b: ops.kernel_cka(a, b, bandwidth=3.0, debiased=debiased, batch=3), (x, y)
    )


def test_errors() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"linear_cka: x must have at least 4 rows, got 3"):
        ops.linear_cka(x, x, debiased=True)
    with pytest.raises(ValueError, match=r"kernel_cka: kernel must be one of rbf, linear"):
        ops.kernel_cka(x, x, kernel="poly")
    with pytest.raises(ValueError, match=r"kernel_cka: bandwidth must be positive, got 0.0"):
        ops.kernel_cka(x, x, bandwidth=0.0)
