"""Checks of the device kernels of masked_matmul, shared by the emulation and by real devices.

Every check takes the namespace of ops (``torch.ops.sapwood_emu`` or ``torch.ops.sapwood``) and a
problem whose tensors lie where the ops run. Expected values are plain torch in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, int, int]  # batch, N, K

SHAPES: list[Shape] = [
    (0, 3, 5),
    (3, 0, 5),
    (3, 5, 0),
    (1, 1, 1),
    (1, 130, 30),
    (3, 17, 65),
    (8, 16, 64),
    (9, 7, 130),
    (32, 5, 33),
    (33, 9, 48),
    (65, 3, 40),
]
DENSITIES = (0.0, 0.1, 0.5, 1.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
UNTRANSPOSED = (None, None, None, None)


@dataclass
class Problem:
    """A masked product; weights off the mask are NaN and must never show."""

    x: Tensor  # (B, K)
    weight: Tensor  # (N, K)
    mask: Tensor  # (N, K) bool
    bias: Tensor  # (N,)
    grad: Tensor  # (B, N)

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    @property
    def weight64(self) -> Tensor:
        return torch.where(self.mask, self.weight.double(), 0.0)


def problem(
    shape: Shape,
    density: float = 0.4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    batch, n, k = shape
    g = torch.Generator().manual_seed(batch * 1000003 + n * 1009 + k * 7 + int(density * 100))
    mask = torch.rand(n, k, generator=g) < density
    if n > 2 and density not in (0.0, 1.0):
        mask[0], mask[1] = False, True  # an empty row and a full one
    weight = torch.randn(n, k, generator=g).masked_fill(~mask, float("nan"))
    return Problem(
        torch.randn(batch, k, generator=g).to(device, dtype),
        weight.to(device, dtype),
        mask.to(device),
        torch.randn(n, generator=g).to(device, dtype),
        torch.randn(batch, n, generator=g).to(device, dtype),
    )


def assert_sums(
    actual: Tensor,
    expected: Tensor,  # float64
    magnitude: Tensor,  # float64, sum of the absolute terms
    terms: int,
    dtype: torch.dtype,
) -> None:
    """Bounds the error of a sum of `terms` products by its accumulator, then by one rounding."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 4 * max(terms, 1) * torch.finfo(accumulator).eps * magnitude
    if dtype in (torch.float16, torch.bfloat16):
        bound = bound + torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"error {error.max():.3g}, bound {bound.max():.3g}"


def check_masked_matmul(ops: Any, p: Problem) -> None:
    dtype, terms = p.x.dtype, p.k + 1
    x, grad, bias, w = p.x.double(), p.grad.double(), p.bias.double(), p.weight64
    y = ops.masked_matmul(p.x, p.weight, p.mask, p.bias, False)
    magnitude = x.abs() @ w.abs().T + bias.abs()
    assert_sums(y, x @ w.T + bias, magnitude, terms, dtype)
    assert_sums(
        ops.masked_matmul(p.x, p.weight, p.mask.to(torch.uint8), None, False),
        x @ w.T,
        magnitude,
        terms,
        dtype,
    )
    for dense in (False, True):
        gx, gw = ops.masked_matmul_backward(p.grad, p.x, p.weight, p.mask, True, True, dense)
        assert_sums(gx, grad @ w, grad.abs() @ w.abs(), len(w), dtype)
        kept = torch.ones_like(p.mask) if dense else p.mask
        expected, magnitude = (grad.T @ x) * kept, (grad.abs().T @ x.abs()) * kept
        assert_sums(gw, expected, magnitude, len(x), dtype)
    gx, gw = ops.masked_matmul_backward(p.grad, p.x, p.weight, p.mask, False, False, False)
    assert gx.shape == gw.shape == (0,)


def check_packing(ops: Any, reference: Any, p: Problem) -> None:
    """Structure and values are exactly the reference's."""
    packed = ops.pack_csr(p.weight, p.mask)
    for name, got, wanted in zip(
        ("values", "cols", "row_ptr", "row_order"),
        packed,
        reference.pack_csr(p.weight, p.mask),
        strict=True,
    ):
        assert torch.equal(got, wanted), name
        assert got.dtype == wanted.dtype, name
    for name, got, wanted in zip(
        ("values", "words", "row_ptr"),
        ops.pack_bitmap(p.weight, p.mask),
        reference.pack_bitmap(p.weight, p.mask),
        strict=True,
    ):
        assert torch.equal(got, wanted), name
        assert got.dtype == wanted.dtype, name
    for name, got, wanted in zip(
        ("cols_t", "row_ptr_t", "row_order_t", "perm"),
        ops.transpose_csr(packed[1], packed[2], p.k),
        reference.transpose_csr(packed[1], packed[2], p.k),
        strict=True,
    ):
        assert torch.equal(got, wanted), name
        assert got.dtype == wanted.dtype, name


def packed_linear(
    ops: Any,
    reference: Any,
    fmt: str,
    p: Problem,
    *,
    bias: bool = True,
    activation: str = "none",
    value_dtype: torch.dtype | None = None,
) -> Tensor:
    """The packed product of one format, its structure built by the reference."""
    values, *structure = getattr(reference, f"pack_{fmt}")(p.weight, p.mask)
    tail = UNTRANSPOSED if fmt == "csr" else ()
    result: Tensor = getattr(ops, f"packed_linear_{fmt}")(
        p.x,
        values.to(value_dtype or values.dtype),
        *structure,
        p.bias if bias else None,
        p.k,
        activation,
        *tail,
    )
    return result


def check_packed_linear(
    ops: Any,
    reference: Any,
    fmt: str,
    p: Problem,
    *,
    bias: bool = True,
    activation: str = "none",
    value_dtype: torch.dtype | None = None,
) -> None:
    dtype = p.x.dtype
    y = packed_linear(
        ops, reference, fmt, p, bias=bias, activation=activation, value_dtype=value_dtype
    )
    w = p.weight64 if value_dtype is None else p.weight64.to(value_dtype).double()
    b = p.bias.double() if bias else torch.zeros_like(p.bias, dtype=torch.float64)
    before = p.x.double() @ w.T + b
    # Every activation has a slope below 1.2; its own rounding is relative to its input.
    magnitude = 1.2 * (p.x.double().abs() @ w.abs().T + b.abs())
    expected = ACTIVATIONS[activation](before)
    if activation != "none":
        magnitude = magnitude + 8 * before.abs()
    assert_sums(y, expected, magnitude, p.k + 1, dtype)


def check_sampled_matmul(ops: Any, reference: Any, p: Problem) -> None:
    _, cols, row_ptr, _ = reference.pack_csr(p.weight, p.mask)
    grad, x = p.grad.double(), p.x.double()
    assert_sums(
        ops.sampled_matmul(p.grad, p.x, cols, row_ptr),
        (grad.T @ x)[p.mask],
        (grad.abs().T @ x.abs())[p.mask],
        len(x),
        p.x.dtype,
    )
