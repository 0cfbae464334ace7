"""Derivatives and transforms of the public functions of the family."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from sapwood import ops
from sapwood.reference import similarity as reference
from tests.test_similarity import KINDS
from tests.test_similarity_semantics import special


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_matrix(kind: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def both(a: Tensor, b: Tensor) -> Tensor:
        return ops.similarity_matrix(a, b, kind=kind)

    assert torch.autograd.gradcheck(both, (x, y))
    assert torch.autograd.gradgradcheck(both, (x, y))
    assert torch.autograd.gradcheck(lambda a: ops.similarity_matrix(a, kind=kind), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_selected_values(kind: str) -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    threshold = -100.0  # every pair: a finite difference changes no choice
    for other in (None, y):
        inputs = (x,) if other is None else (x, y)
        for selected in (
            lambda *t: ops.similarity_pairs(*t, threshold=threshold, kind=kind).value,
            lambda a, *t: ops.similarity_topk(a, 3, *t, kind=kind)[0],
        ):
            assert torch.autograd.gradcheck(selected, inputs)
            assert torch.autograd.gradgradcheck(selected, inputs)


def test_gradients_at_special_rows_are_zero() -> None:
    x = special(torch.float64).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (
            ops.similarity_matrix(x, kind="correlation"),
            ops.similarity_topk(x, 4, kind="correlation")[0],
        ):
            (grad,) = torch.autograd.grad(value.sum(), x)
            assert torch.isfinite(grad).all()
            assert not grad[:5].any()
            assert grad[8:].any(1).all()


def test_padding_has_no_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    values, indices = ops.similarity_topk(x, 4)
    assert indices.tolist() == [[1, -1, -1, -1], [0, -1, -1, -1]]
    values[:, 0].sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_func_transforms_of_the_matrix() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return ops.similarity_matrix(t, kind="correlation").sin().sum()

    def plain(t: Tensor) -> Tensor:
        return reference.similarity_matrix(t, t, "correlation", False).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
    batch = torch.stack([x, 2 * x + 1])
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(batch), torch.vmap(torch.func.grad(plain))(batch)
    )


def test_meta_device() -> None:
    x = torch.empty(3, 4, device="meta")
    assert ops.similarity_matrix(x).shape == (3, 3)
    assert ops.similarity_topk(x, 5)[0].shape == (3, 5)
    assert ops.linear_cka(x, x).shape == ()


def test_compile_of_the_matrix() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.similarity_matrix, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 5)
    torch.testing.assert_close(compiled(x), ops.similarity_matrix(x))
