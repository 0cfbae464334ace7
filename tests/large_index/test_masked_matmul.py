"""masked_matmul: weights, structures and results that reach beyond 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .memory import FAR, behind, last_blocks, last_of, on_linux, reserved

pytestmark = on_linux

NOT_TRANSPOSED = (None, None, None, None)
Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """x (3, 9), a weight (4, 9) and its mask."""
    return torch.randn(3, 9), torch.randn(4, 9), torch.rand(4, 9) < 0.5


# Packed weights -----------------------------------------------------------------------------------


def test_packed_linear_csr(ops: Any, problem: Problem) -> None:
    x, weight, mask = problem
    values, cols, row_ptr, order = ops.pack_csr(weight, mask)
    rest = (order, None, 9, "none", *NOT_TRANSPOSED)
    far = ops.packed_linear_csr(x, behind(values), behind(cols), row_ptr + FAR, *rest)
    assert torch.equal(far, ops.packed_linear_csr(x, values, cols, row_ptr, *rest))


def test_packed_linear_bitmap(ops: Any, problem: Problem) -> None:
    x, weight, mask = problem
    values, words, row_ptr = ops.pack_bitmap(weight, mask)
    rest = (None, 9, "none")
    far = ops.packed_linear_bitmap(x, behind(values), words, row_ptr + FAR, *rest)
    assert torch.equal(far, ops.packed_linear_bitmap(x, values, words, row_ptr, *rest))


def test_packed_linear_sell(problem: Problem) -> None:
    x, weight, mask = problem
    ops = torch.ops.sapwood
    values, index, window, slice_ptr = ops.pack_sell(weight, mask)
    steps = FAR // 64  # of 64 slots each
    far_window = torch.cat([torch.zeros(steps, dtype=torch.int32), window])
    rest = (None, 4, 9, "none")
    far = ops.packed_linear_sell(
        x, behind(values), behind(index), far_window, slice_ptr + steps, *rest
    )
    assert torch.equal(far, ops.packed_linear_sell(x, values, index, window, slice_ptr, *rest))


def test_sampled_matmul(ops: Any, problem: Problem) -> None:
    """The result is as long as the structure: its first part is never written."""
    x, weight, mask = problem
    grad = torch.randn(3, 4)
    _, cols, row_ptr, _ = ops.pack_csr(weight, mask)
    far = ops.sampled_matmul(grad, x, behind(cols), row_ptr + FAR)
    assert torch.equal(far[FAR:], ops.sampled_matmul(grad, x, cols, row_ptr))


def test_transpose_csr(problem: Problem) -> None:
    """The zeros before the structure count as entries of column 0, but no row has them."""
    _, weight, mask = problem
    mask[:, 0] = False
    ops = torch.ops.sapwood
    _, cols, row_ptr, _ = ops.pack_csr(weight, mask)
    rows_t, row_ptr_t, _, perm = ops.transpose_csr(behind(cols), row_ptr + FAR, 9)
    near = ops.transpose_csr(cols, row_ptr, 9)
    assert torch.equal(rows_t[FAR:], near[0])
    assert torch.equal(row_ptr_t[1:], near[1][1:] + FAR)
    assert torch.equal(perm[FAR:], near[3] + FAR)


# Packing ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pack_csr", "pack_bitmap", "pack_sell"])
def test_packing(name: str) -> None:
    """The kept weights are the last of a matrix of 2^31 and more."""
    weight = reserved(2**15 + 3, 2**16, dtype=torch.bfloat16)
    mask = reserved(2**15 + 3, 2**16, dtype=torch.bool)
    weight[-2:, -9:] = torch.randn(2, 9).bfloat16()
    mask[-2:, -9::2] = True
    values = getattr(torch.ops.sapwood, name)(weight, mask)[0]
    kept = weight[-2:, -9::2].flatten()
    if name == "pack_sell":  # rows side by side
        values, kept = values[values != 0].sort().values, kept.sort().values
    assert torch.equal(values, kept)


@pytest.mark.parametrize("name", ["pack_csr", "pack_bitmap"])
def test_packing_the_last_rows(emulated: Any, name: str) -> None:
    """A block packs four rows; the words of the bitmap reach beyond 2^31 too."""
    rows, k, of_block = 2**22 + 4, 2**13, 4
    near, kept = torch.randn(of_block, k).half(), torch.rand(of_block, k) < 0.01
    weight, mask = last_of(near, rows), last_of(kept, rows)
    with last_blocks():
        values, places, *_ = getattr(emulated, name)(weight, mask)
    assert torch.equal(values, near[kept])
    if name == "pack_csr":
        assert torch.equal(places, kept.nonzero()[:, 1].short())
    else:
        assert places.numel() > FAR
        assert torch.equal(places[-of_block:], torch.ops.sapwood.pack_bitmap(near, kept)[1])


@pytest.mark.parametrize("name", ["pack_csr", "pack_bitmap", "pack_sell"])
@pytest.mark.parametrize("shape", [(1, FAR), (FAR, 1)], ids=["columns", "rows"])
def test_more_than_indices_hold_is_refused(name: str, shape: tuple[int, int]) -> None:
    """Views of stride 0: refused before anything of their size is made."""
    weight, mask = torch.ones(1, 1).expand(shape), torch.ones(1, 1, dtype=torch.bool).expand(shape)
    what = "columns" if shape[1] == FAR else "rows"
    with pytest.raises(RuntimeError, match=rf"{name}: weight's {what} must be fewer than 2\^31"):
        getattr(torch.ops.sapwood, name)(weight, mask)


# Masking by emulated kernels: torch multiplies what their last blocks write -----------------------


@pytest.mark.slow
@pytest.mark.parametrize("contiguous", [True, False], ids=["flat", "strided"])
def test_masked_matmul(emulated: Any, contiguous: bool) -> None:
    rows, k = 2**15 + 1, 2**16
    weight, mask = reserved(rows, k), reserved(rows, k, dtype=torch.bool)
    weight[-1, -8:] = torch.arange(1.0, 9.0)
    mask[-1, -8:] = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]).bool()
    kept = 1 + 4 + 5 + 6 + 8
    if not contiguous:
        mask, weight, kept = mask[:, :-1], weight[:, :-1], kept - 8
    x, grad = torch.ones(1, weight.shape[1]), torch.ones(1, rows)
    with last_blocks():
        y = emulated.masked_matmul(x, weight, mask, None, False)
        dx, _ = emulated.masked_matmul_backward(grad, x, weight, mask, True, False, False)
    assert y[0].nonzero().tolist() == [[rows - 1]]
    assert float(y[0, -1]) == kept
    assert float(dx.sum()) == kept
    assert torch.equal(dx[0].nonzero()[:, 0], mask[-1].nonzero()[:, 0])


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_gradient_of_a_masked_weight(emulated: Any) -> None:
    """In place: a block has 512 weights."""
    rows, k, of_block = 2**15 + 1, 2**16, 512
    mask = reserved(rows, k, dtype=torch.bool)
    mask[-1, ::2] = True
    grad, x = torch.ones(1, rows), torch.randn(1, k)
    weight = grad.new_zeros(1, 1).expand(rows, k)  # of which only the shape counts
    with last_blocks():
        _, dw = emulated.masked_matmul_backward(grad, x, weight, mask, False, True, False)
    assert torch.equal(dw[-1, -of_block::2], x[0, -of_block::2])
    assert not dw[-1, -of_block + 1 :: 2].any()
    assert torch.equal(dw[-1, :of_block], x[0, :of_block])  # of another block
