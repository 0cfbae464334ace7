"""Elements more than 2^31 from the start of a tensor: they are read where they lie.

The tensors are reserved, not filled: only the pages that a kernel writes or reads take memory, and
most problems are such that a kernel touches few. The CUDA kernels run on the CPU, where their
problems are small enough for that.
"""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops

FAR = 2**31
_NO_RESERVE = 0x4000  # Linux: pages count only when they are touched

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.maxsize < 2**32, reason="memory is reserved as Linux does it"
)
NOT_TRANSPOSED = (None, None, None, None)


def reserved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    memory.madvise(mmap.MADV_HUGEPAGE)  # what is only read shares one large page of zeros
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def behind(near: Tensor) -> Tensor:
    """The same entries at the end of a tensor, more than 2^31 elements from its start."""
    rows = -(-FAR // max(1, near[0].numel()))
    far = reserved(rows + len(near), *near.shape[1:], dtype=near.dtype)
    far[rows:] = near
    return far


@pytest.fixture(params=["cpu", "emulated"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The ops of the CPU, and the CUDA kernels compiled for it."""
    if request.param == "cpu":
        return torch.ops.sapwood
    library: Path = request.getfixturevalue("emulation_library")
    namespaces: Any = torch.ops
    namespaces.load_library(str(library))
    return namespaces.sapwood_emu


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """x (3, 9), a weight (4, 9) and its mask."""
    return torch.randn(3, 9), torch.randn(4, 9), torch.rand(4, 9) < 0.5


Problem = tuple[Tensor, Tensor, Tensor]


# masked_matmul ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["pack_csr", "pack_bitmap", "pack_sell"])
@pytest.mark.parametrize("shape", [(1, FAR), (FAR, 1)], ids=["columns", "rows"])
def test_more_than_indices_hold_is_refused(name: str, shape: tuple[int, int]) -> None:
    """Views of stride 0: refused before anything of their size is made."""
    weight, mask = torch.ones(1, 1).expand(shape), torch.ones(1, 1, dtype=torch.bool).expand(shape)
    what = "columns" if shape[1] == FAR else "rows"
    with pytest.raises(RuntimeError, match=rf"{name}: weight's {what} must be fewer than 2\^31"):
        getattr(torch.ops.sapwood, name)(weight, mask)


# logsemiring --------------------------------------------------------------------------------------


def test_log_scan_path(ops: Any) -> None:
    """One step between 46 400 states; a path reads one column of it."""
    k = 46_400
    t = reserved(1, 1, k, k, dtype=torch.float64)
    t[0, 0, k - 2, k - 1] = 5
    final = torch.zeros(1, k, dtype=torch.float64)
    final[0, k - 1] = 1
    states = torch.zeros(1, 2, k, dtype=torch.float64)
    path = ops.log_scan_path(t, states, final, 1, 7, True)
    assert path.tolist() == [[[k - 2, k - 1]]]


@pytest.mark.slow
def test_segment_max() -> None:
    x = reserved(1, FAR + 6, 1)
    x[0, FAR:, 0] = torch.tensor([1.0, 3, 2, 6, 5, 4])
    ptr = torch.tensor([0, FAR, FAR + 2, FAR + 6])
    values, indices = torch.ops.sapwood.segment_max(x, ptr, None)
    assert values.flatten().tolist() == [0, 3, 6]
    assert indices.flatten().tolist() == [0, FAR + 1, FAR + 3]


@pytest.mark.slow
def test_max_matmul() -> None:
    m, k = 2**15 + 3, 2**16
    a = reserved(1, m, k)
    a[0, -1, -1] = 3
    values, indices = torch.ops.sapwood.max_matmul(a, torch.zeros(1, k, 1))
    assert values[0, :, 0].nonzero().tolist() == [[m - 1]]
    assert float(values[0, -1, 0]) == 3
    assert int(indices[0, -1, 0]) == k - 1


# splat2d ------------------------------------------------------------------------------------------


def test_splat2d_backward(ops: Any) -> None:
    """The gradient of the second image lies 2^31 elements behind that of the first."""
    near = torch.randn(2, 3, 20, 30)
    far = reserved(FAR + near[0].numel()).as_strided(near.shape, (FAR, 600, 30, 1))
    far.copy_(near)
    mu, chol = 10 + 4 * torch.randn(2, 5, 2), torch.tensor([2.0, 0.3, 1.5]).expand(2, 5, 3)
    rest = (mu, chol.contiguous(), torch.randn(2, 5, 3), None, 11.0, True)
    found = ops.splat2d_backward(far, *rest)
    for a, b in zip(found, ops.splat2d_backward(near, *rest), strict=True):
        torch.testing.assert_close(a, b)


def test_splat2d_pairs() -> None:
    """More pairs of pixels and Gaussians than 32 bits count."""
    side = 2**16
    mu, chol = torch.full((1, 1, 2), 5.0), torch.tensor([[[1.0, 0.0, 1.0]]])
    count = torch.ops.sapwood.splat2d_pairs(mu, chol, None, side, side, math.inf)
    assert count.tolist() == [side * side]


# copruned_conv ------------------------------------------------------------------------------------


def test_copruned_conv2d() -> None:
    """The wanted tile reads the last pixels of an image of more than 2^31 values."""
    height, width = 2**14, 2**13 + 64
    x = reserved(1, height, width, 16).permute(0, 3, 1, 2)  # channels last
    x[0, :, -64:, -64:] = torch.randn(16, 64, 64)
    weight = torch.randn(16, 16, 1, 1)
    region = torch.zeros(1, height // 64, width // 64, dtype=torch.bool)
    region[0, -1, -1] = True
    shape = ([8, 8], [0, 0], [1, 1], 1, 8, 16)
    masks = (region, None, None)
    y = torch.ops.sapwood.copruned_conv2d(x, weight, None, *masks, None, *shape, "none")
    corner = x[:, :, -64:, -64:].contiguous()
    expected = torch.nn.functional.conv2d(corner, weight, stride=8)
    torch.testing.assert_close(y[:, :, -8:, -8:], expected)
    assert float(y.abs().sum()) == float(y[:, :, -8:, -8:].abs().sum())

    grad = torch.zeros_like(y)
    grad[:, :, -8:, -8:] = torch.randn(1, 16, 8, 8)
    backward = torch.ops.sapwood.copruned_conv2d_backward
    _, found, _ = backward(grad, x, weight, *masks, *shape, False, True, False)
    near = grad[:, :, -8:, -8:].contiguous()
    wanted = torch.nn.grad.conv2d_weight(corner, [16, 16, 1, 1], near, stride=8)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("stride", "dilation", "what"),
    [
        (2**24, 1, r"stride, padding and dilation must be below 2\^24"),
        (1, 2**24, r"stride, padding and dilation must be below 2\^24"),
        (1, 20_000, "must give windows of fewer than 134217728 pixels"),
    ],
)
def test_windows_that_places_cannot_number(stride: int, dilation: int, what: str) -> None:
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    size = 3 if max(stride, dilation) < 2**24 else 1
    region = torch.zeros(1, size, size, dtype=torch.bool)
    region[0, 0, 0] = True
    padding = min(dilation, 2**24 - 1)
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2, 1, 4, 8, "none")
    with pytest.raises(RuntimeError, match=what):
        torch.ops.sapwood.copruned_conv2d(x, weight, None, region, None, None, None, *rest)


def test_more_tiles_than_indices_hold_are_refused(ops: Any) -> None:
    mask = torch.ones(1, dtype=torch.bool).expand(FAR)
    with pytest.raises(RuntimeError, match=r"tile_list: mask must have fewer than 2\^31 entries"):
        ops.tile_list(mask)
