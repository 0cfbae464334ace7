"""The masked_matmul family: the battery over its ops, then what is particular to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood.ops.masked_matmul import ACTIVATIONS, FORMATS
from sapwood.reference import masked_matmul as reference
from tests.check_op import (
    DifferentiableBattery,
    OpBattery,
    Sample,
    TraceableBattery,
    floating,
    layouts_of,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)

MAIN = (9, 33, 17)  # batch, in, out
SHAPES = [
    MAIN,
    (0, 7, 5),
    (1, 1, 1),
    (3, 0, 4),
    (2, 5, 0),
    (1, 129, 130),
    (8, 130, 151),
    (65, 64, 48),
    (17, 257, 33),
]
GRADCHECK_SHAPES = [(3, 5, 4), (2, 7, 3), (4, 3, 6), (1, 17, 2), (5, 2, 2)]
SPARSITIES = (0.0, 0.5, 0.9, 1.0)


def problem(batch: int, k: int, n: int, sparsity: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(batch * 1000003 + k * 1009 + n * 7 + int(sparsity * 100))
    mask = torch.rand(n, k, generator=g) >= sparsity
    if n > 2:
        mask[0], mask[1] = False, True  # an empty row and a full one
    return {
        "x": torch.randn(batch, k, generator=g),
        "weight": torch.randn(n, k, generator=g),
        "mask": mask,
        "bias": torch.randn(n, generator=g),
        "grad": torch.randn(batch, n, generator=g),
    }


def each_problem() -> list[tuple[str, frozenset[str], dict[str, Tensor]]]:
    found = []
    for b, k, n in SHAPES + GRADCHECK_SHAPES:
        for s in SPARSITIES if (b, k, n) == MAIN else (0.4,):
            tags = frozenset({"main"} if ((b, k, n), s) == (MAIN, 0.5) else ())
            found.append((f"{b}x{k}x{n}-{s}", tags, problem(b, k, n, s)))
    return found


def samples(
    make: Callable[[dict[str, Tensor]], tuple[Any, ...]],
    grad: tuple[int, ...] = (),
    label: str = "",
) -> list[Sample]:
    return [Sample(i + label, make(p), grad, tags) for i, tags, p in each_problem()]


def structure(p: dict[str, Tensor], fmt: str) -> tuple[Tensor, ...]:
    """Values and index tensors of a format, built by the reference."""
    packer = {
        "csr": reference.pack_csr,
        "bitmap": reference.pack_bitmap,
        "sell": reference.pack_sell,
    }
    return packer[fmt](p["weight"], p["mask"])


NOT_TRANSPOSED = (None, None, None, None)


class TestMaskedMatmul(DifferentiableBattery):
    name = "masked_matmul"
    bitwise = False
    vmappable = (0, 1, 3)
    samples = samples(
        lambda p: (p["x"], p["weight"], p["mask"], p["bias"], False), grad=(0, 1, 3)
    ) + [
        Sample(f"{i}-no-bias", (p["x"], p["weight"], p["mask"], None, False), (0, 1))
        for i, _, p in each_problem()[:4]
    ]

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[1]) + 1


class TestMaskedMatmulBackward(DifferentiableBattery):
    name = "masked_matmul_backward"
    bitwise = False
    vmappable = (0, 1)
    samples = samples(
        lambda p: (p["grad"], p["x"], p["weight"], p["mask"], True, True, False), grad=(0, 1, 2)
    ) + [
        Sample(f"{i}-{label}", (p["grad"], p["x"], p["weight"], p["mask"], *flags), grad)
        for i, _, p in each_problem()[:2]
        for label, flags, grad in (
            ("only-x", (True, False, False), (0, 2)),
            ("only-weight", (False, True, False), (0, 1)),
            ("neither", (False, False, False), ()),
        )
    ]

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(args[0].shape)


class TestPackCsr(OpBattery):
    name = "pack_csr"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestPackBitmap(OpBattery):
    name = "pack_bitmap"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestPackSell(OpBattery):
    name = "pack_sell"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestTransposeCsr(TraceableBattery):
    name = "transpose_csr"
    exact = True
    samples = samples(lambda p: (*structure(p, "csr")[1:3], p["weight"].shape[1]))


class LinearBattery:
    """Bounds of the packed products: an activation moves no error by more than a factor 1.13."""

    c = 4.0 * 1.13

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[1]) + 1

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        linear = ["none" if isinstance(a, str) else a.abs() if floating(a) else a for a in args]
        return (self.reference(*linear),)  # type: ignore[attr-defined]


def with_activations(make: Callable[[dict[str, Tensor], str], tuple[Any, ...]]) -> list[Sample]:
    problems = each_problem()
    return samples(lambda p: make(p, "none")) + [
        Sample(f"{i}-{act}", make(p, act)) for i, _, p in problems[:2] for act in ACTIVATIONS[1:]
    ]


class TestPackedLinearCsr(LinearBattery, DifferentiableBattery):
    name = "packed_linear_csr"
    vmappable = (0, 1, 5)
    samples = (
        samples(
            lambda p: (
                *(p["x"], *structure(p, "csr"), p["bias"], p["x"].shape[1], "none"),
                *NOT_TRANSPOSED,
            ),
            grad=(0, 1, 5),
        )
        + samples(
            lambda p: (
                *(p["x"], *structure(p, "csr"), None, p["x"].shape[1], "none"),
                *reference.transpose_csr(*structure(p, "csr")[1:3], p["x"].shape[1]),
            ),
            grad=(0, 1),
            label="-transposed-given",
        )
        + with_activations(
            lambda p, act: (
                *(p["x"], *structure(p, "csr"), p["bias"], p["x"].shape[1], act),
                *NOT_TRANSPOSED,
            )
        )[-2 * (len(ACTIVATIONS) - 1) :]
    )


class TestPackedLinearBitmap(LinearBattery, TraceableBattery):
    name = "packed_linear_bitmap"
    vmappable = (0, 1, 4)
    samples = with_activations(
        lambda p, act: (p["x"], *structure(p, "bitmap"), p["bias"], p["x"].shape[1], act)
    )


class TestPackedLinearSell(LinearBattery, TraceableBattery):
    name = "packed_linear_sell"
    vmappable = (0, 1, 5)
    samples = with_activations(
        lambda p, act: (
            *(p["x"], *structure(p, "sell"), p["bias"]),
            *(p["weight"].shape[0], p["x"].shape[1], act),
        )
    )


class TestSampledMatmul(DifferentiableBattery):
    name = "sampled_matmul"
    vmappable = (0, 1)
    samples = samples(lambda p: (p["grad"], p["x"], *structure(p, "csr")[1:3]), grad=(0, 1))

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[0])


# masked_matmul: what is particular to it ----------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["csr", "bitmap"])
def test_offsets_beyond_32_bits(fmt: str) -> None:
    """2^31 + 512 inputs; a stride-0 view keeps them small until the kernel lays them out."""
    rows = 2**31 // 64 + 8
    x = torch.ones(1, 64, dtype=torch.bfloat16).expand(rows, 64)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, ::2] = True
    packed = sapwood.ops.pack_sparse(torch.ones(1, 64, dtype=torch.bfloat16), mask, format=fmt)
    y = sapwood.ops.packed_linear(x, packed)
    assert bool((y[-16:] == 32.0).all())
    assert float(y.min()) == float(y.max()) == 32.0


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
