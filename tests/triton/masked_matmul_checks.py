"""What the Triton kernels of masked_matmul must compute, on any device.

The interpreter's tests and the GPU's tests call these functions. The oracle is dense torch in
float64 on the CPU. Bounds: with terms = sum of |factors| of an output and K its length, float32
accumulation errs by at most 4 K eps terms; a half-precision result by one unit in the last place
more. The activations have slope at most 1.13 and cost a few float32 roundings themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sapwood.triton_kernels import masked_matmul as kernels
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
SHAPES = (  # (B, N, K)
    (0, 5, 7),
    (3, 0, 7),
    (3, 5, 0),
    (0, 0, 0),
    (1, 1, 1),
    (1, 17, 33),
    (2, 3, 16),
    (7, 65, 31),
    (17, 33, 129),
    (33, 5, 40),
    (65, 9, 50),
    (130, 66, 34),
)
SPLIT_SHAPES = ((1, 3, 1100), (5, 6, 2049), (20, 70, 1541))  # long rows, summed in ranges
EPS32 = torch.finfo(torch.float32).eps


def random_mask(n: int, k: int, density: float) -> Tensor:
    """(n, k) bool; with more than two rows, one is empty and one is full."""
    mask = torch.rand(n, k) < density
    if n > 2:
        mask[0], mask[-1] = False, True
    return mask


def row_pointers(mask: Tensor) -> Tensor:
    return F.pad(mask.sum(1).cumsum(0), (1, 0))


def pack_words(mask: Tensor) -> Tensor:
    """The bitmap, bit by bit as the format's definition says."""
    n, k = mask.shape
    words = torch.zeros(n, (k + 15) // 16, dtype=torch.int32)
    for column in range(k):
        words[:, column // 16] |= mask[:, column].int() << (column % 16)
    return words.to(torch.int16)


def columns_of(mask: Tensor) -> Tensor:
    """The columns of a CSR structure as the bit patterns of uint16."""
    return mask.nonzero()[:, 1].to(torch.int16)


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """4 K eps sum |terms|, with the bias as one term more."""
    terms = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        terms = terms + bias.double().abs()
    return 4 * (x.shape[1] + 1) * EPS32 * terms


def assert_within(result: Tensor, exact: Tensor, bound: Tensor) -> None:
    """``result`` is ``exact`` up to ``bound`` and one unit in the last place of its type."""
    info = torch.finfo(result.dtype)
    error = (result.cpu().double() - exact).abs()
    allowed = bound + info.eps * exact.abs() + info.smallest_normal
    assert result.shape == exact.shape
    assert bool((error <= allowed).all()), f"worst excess {(error - allowed).max():.3g}"


def check_packed_linear(
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    activation: str = "none",
    density: float = 0.4,
    value_dtype: torch.dtype | None = None,
    with_bias: bool = True,
) -> None:
    b, n, k = shape
    mask = random_mask(n, k, density) if 0 < density < 1 else torch.full((n, k), density == 1)
    weight = torch.where(mask, torch.randn(n, k), 0).to(value_dtype or dtype)
    x, bias = torch.randn(b, k).to(dtype), torch.randn(n).to(dtype) if with_bias else None
    linear = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = ACTIVATIONS[activation](linear)
    result = kernels.packed_linear_bitmap(
        x.to(device),
        weight[mask].to(device),
        pack_words(mask).to(device),
        row_pointers(mask).to(device),
        None if bias is None else bias.to(device),
        k,
        activation,
    )
    assert result.dtype == dtype
    assert result.is_contiguous()
    bound = linear_bound(x, weight, bias)
    if activation != "none":
        bound = 1.13 * bound + 16 * EPS32 * linear.abs()
    assert_within(result, exact, bound)


def check_masked_matmul(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, *, with_bias: bool = True
) -> None:
    b, n, k = shape
    mask = random_mask(n, k, 0.4)
    weight, x = torch.randn(n, k).to(dtype), torch.randn(b, k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    kept = torch.where(mask, weight, 0)
    exact = F.linear(x.double(), kept.double(), None if bias is None else bias.double())
    weight = torch.where(mask, weight, torch.nan)  # what is masked out must not matter
    result = kernels.masked_matmul(
        x.to(device),
        weight.to(device),
        mask.to(device),
        None if bias is None else bias.to(device),
    )
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert_within(result, exact, linear_bound(x, kept, bias))


def check_sampled_matmul(
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    column_dtype: torch.dtype = torch.int16,
) -> None:
    b, n, k = shape
    mask = random_mask(n, k, 0.4)
    grad, x = torch.randn(b, n).to(dtype), torch.randn(b, k).to(dtype)
    columns = mask.nonzero()[:, 1].to(column_dtype)
    result = kernels.sampled_matmul(
        grad.to(device), x.to(device), columns.to(device), row_pointers(mask).to(device)
    )
    assert result.dtype == dtype
    exact = (grad.double().T @ x.double())[mask]
    terms = (grad.double().abs().T @ x.double().abs())[mask]
    assert_within(result, exact, 4 * max(b, 1) * EPS32 * terms)
