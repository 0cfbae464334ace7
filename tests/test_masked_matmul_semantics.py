"""What masked_matmul promises beyond the battery: masks, gradients, autocast, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sapwood
from sapwood.ops.masked_matmul import FORMATS
from tests.check_op import layouts_of
from tests.test_masked_matmul import MAIN, NOT_TRANSPOSED, problem, structure


def test_equals_linear_in_float64() -> None:
    p = problem(40, 123, 77, 0.6)
    x, w, b = (p[k].double() for k in ("x", "weight", "bias"))
    expected = F.linear(x, torch.where(p["mask"], w, 0.0), b)
    actual = sapwood.ops.masked_matmul(x, w, p["mask"], b)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(33,), (2, 33), (2, 3, 33), (0, 33), (2, 0, 33)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    p = problem(*MAIN, 0.5)
    x = torch.randn(shape)
    expected = F.linear(x, torch.where(p["mask"], p["weight"], 0.0), p["bias"])
    actual = sapwood.ops.masked_matmul(x, p["weight"], p["mask"], p["bias"])
    torch.testing.assert_close(actual, expected)
    packed = sapwood.ops.pack_sparse(p["weight"], p["mask"])
    torch.testing.assert_close(sapwood.ops.packed_linear(x, packed, p["bias"]), expected)


def test_uint8_mask_counts_every_non_zero_value() -> None:
    p = problem(*MAIN, 0.5)
    mask = p["mask"].to(torch.uint8) * 200
    actual = sapwood.ops.masked_matmul(p["x"], p["weight"], mask)
    assert torch.equal(actual, sapwood.ops.masked_matmul(p["x"], p["weight"], p["mask"]))


def test_soft_mask_gets_a_gradient() -> None:
    p = problem(*MAIN, 0.5)
    soft = torch.rand(p["weight"].shape, requires_grad=True)
    y = sapwood.ops.masked_matmul(p["x"], p["weight"], soft, p["bias"])
    torch.testing.assert_close(y, F.linear(p["x"], p["weight"] * soft, p["bias"]))
    (grad,) = torch.autograd.grad(y.sum(), soft)
    assert bool(grad.any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_out_weights_do_not_leak(bad: float) -> None:
    p = problem(*MAIN, 0.5)
    w = torch.where(p["mask"], p["weight"], bad).requires_grad_(True)
    y = sapwood.ops.masked_matmul(p["x"], w, p["mask"])
    assert bool(y.isfinite().all())
    x = p["x"].requires_grad_(True)
    grads = torch.autograd.grad(sapwood.ops.masked_matmul(x, w, p["mask"]).sum(), (x, w))
    assert all(bool(g.isfinite().all()) for g in grads)
    for fmt in FORMATS:
        packed = sapwood.ops.pack_sparse(w, p["mask"], format=fmt)
        assert bool(sapwood.ops.packed_linear(p["x"].detach(), packed).isfinite().all()), fmt


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_kept_values_propagate(bad: float) -> None:
    p = problem(*MAIN, 0.5)
    p["weight"][1, 3] = bad  # row 1 is full
    y = sapwood.ops.masked_matmul(p["x"], p["weight"], p["mask"])
    assert not bool(y[:, 1].isfinite().any())
    for fmt in FORMATS:
        packed = sapwood.ops.pack_sparse(p["weight"], p["mask"], format=fmt)
        z = sapwood.ops.packed_linear(p["x"], packed)
        assert not bool(z[:, 1].isfinite().any()), fmt
        assert bool(z[:, 2:].isfinite().all()), fmt


def test_gradients_off_the_mask_are_exactly_zero() -> None:
    p = problem(*MAIN, 0.7)
    w = p["weight"].requires_grad_(True)
    sapwood.ops.masked_matmul(p["x"], w, p["mask"]).square().sum().backward()
    assert w.grad is not None
    assert not bool(w.grad[~p["mask"]].any())
    assert not bool(torch.signbit(w.grad[~p["mask"]]).any())


def test_dense_weight_gradient_is_the_full_product() -> None:
    p = problem(*MAIN, 0.7)
    w = p["weight"].double().requires_grad_(True)
    x, g = p["x"].double(), p["grad"].double()
    y = sapwood.ops.masked_matmul(x, w, p["mask"], weight_grad="dense")
    (grad,) = torch.autograd.grad(y, w, g)
    torch.testing.assert_close(grad, g.mT @ x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_linear(dtype: torch.dtype) -> None:
    p = problem(*MAIN, 0.5)
    packed = sapwood.ops.pack_sparse(p["weight"], p["mask"])
    with torch.autocast("cpu", dtype):
        expected = F.linear(p["x"], p["weight"].where(p["mask"], 0.0), p["bias"])
        masked = sapwood.ops.masked_matmul(p["x"], p["weight"], p["mask"], p["bias"])
        sparse = sapwood.ops.packed_linear(p["x"], packed, p["bias"])
    assert masked.dtype == sparse.dtype == expected.dtype == dtype
    torch.testing.assert_close(masked, expected, rtol=0.02, atol=0.02)  # 8 bits of mantissa
    torch.testing.assert_close(sparse, expected, rtol=0.02, atol=0.02)


def test_index_tensors_with_gaps_are_refused() -> None:
    p = problem(*MAIN, 0.5)
    values, cols, row_ptr, row_order = structure(p, "csr")
    gaps = layouts_of(row_ptr)["gaps"]
    with pytest.raises(RuntimeError, match=r"packed_linear_csr: row_ptr must be contiguous"):
        torch.ops.sapwood.packed_linear_csr(
            *(p["x"], values, cols, gaps, row_order, None, MAIN[1], "none"), *NOT_TRANSPOSED
        )


def error_cases() -> list[tuple[str, dict[str, Any], type[Exception], str]]:
    other = torch.ones(4, 7, dtype=torch.bool)
    return [
        (
            "mask shape",
            {"mask": other},
            ValueError,
            "mask must have weight's shape (4, 8), got (4, 7)",
        ),
        (
            "mask dtype",
            {"mask": torch.ones(4, 8).long()},
            TypeError,
            "mask must be torch.bool or torch.uint8 or torch.float32, got torch.int64",
        ),
        (
            "mask of another float",
            {"mask": torch.ones(4, 8).double()},
            TypeError,
            "mask must be torch.bool or torch.uint8 or torch.float32, got torch.float64",
        ),
        (
            "weight rank",
            {"weight": torch.ones(8)},
            ValueError,
            "weight must have 2 dimensions, got shape (8,)",
        ),
        (
            "integer weight",
            {"weight": torch.ones(4, 8).int(), "input": torch.ones(2, 8).int()},
            TypeError,
            "weight must be floating point, got torch.int32",
        ),
        (
            "input columns",
            {"input": torch.ones(2, 9)},
            ValueError,
            "input must have a last dimension of 8 (weight's columns), got shape (2, 9)",
        ),
        (
            "scalar input",
            {"input": torch.ones(())},
            ValueError,
            "input must have a last dimension of 8 (weight's columns), got shape ()",
        ),
        (
            "input dtype",
            {"input": torch.ones(2, 8).double()},
            TypeError,
            "input must have weight's dtype torch.float32, got torch.float64",
        ),
        ("bias shape", {"bias": torch.ones(5)}, ValueError, "bias must have shape (4,), got (5,)"),
        ("not a tensor", {"mask": [[True]]}, TypeError, "mask must be a tensor, got list"),
        (
            "weight_grad",
            {"weight_grad": "half"},
            ValueError,
            "weight_grad must be one of masked, dense, got 'half'",
        ),
    ]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [c[1:] for c in error_cases()],
    ids=[c[0] for c in error_cases()],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "input": torch.ones(2, 8),
        "weight": torch.ones(4, 8),
        "mask": torch.ones(4, 8, dtype=torch.bool),
    }
    with pytest.raises(kind) as caught:
        sapwood.ops.masked_matmul(**{**args, **change})
    assert str(caught.value) == f"sapwood.masked_matmul: {message}"


def test_mixed_devices_are_named() -> None:
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError, match=r"input is on cpu but mask is on meta"):
        sapwood.ops.masked_matmul(x, w, mask)
