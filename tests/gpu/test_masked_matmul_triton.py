"""The Triton kernels of masked_matmul on a CUDA device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sapwood.triton_kernels import masked_matmul as kernels

from tests.triton.masked_matmul_checks import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    SPLIT_SHAPES,
    check_masked_matmul,
    check_packed_linear,
    check_sampled_matmul,
    columns_of,
    pack_words,
    random_mask,
    row_pointers,
)

pytestmark = pytest.mark.gpu

LARGE = ((1, 2048, 2048), (8, 1000, 4097), (64, 2048, 2048), (257, 1000, 777))
ALL_SHAPES = SHAPES + SPLIT_SHAPES + LARGE

by_shape = pytest.mark.parametrize("shape", ALL_SHAPES, ids=lambda s: "x".join(map(str, s)))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@by_dtype
@by_shape
def test_packed_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_packed_linear("cuda", shape, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 64, 100])
def test_packed_linear_activation(batch: int, activation: str) -> None:
    check_packed_linear("cuda", (batch, 300, 1100), torch.float32, activation=activation)


@pytest.mark.parametrize("batch", [1, 20])
def test_packed_linear_half_values(batch: int) -> None:
    check_packed_linear("cuda", (batch, 70, 500), torch.float32, value_dtype=torch.bfloat16)


@by_dtype
@by_shape
def test_masked_matmul(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_masked_matmul("cuda", shape, dtype)


@by_dtype
@by_shape
def test_sampled_matmul(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_sampled_matmul("cuda", shape, dtype)


@pytest.mark.parametrize("batch", [1, 16, 64, 200])
def test_repeats_bitwise_without_synchronising(batch: int) -> None:
    mask = random_mask(500, 2000, 0.3)
    weight = torch.randn(500, 2000, device="cuda")
    x, grad = torch.randn(batch, 2000, device="cuda"), torch.randn(batch, 500, device="cuda")
    bitmap = weight[mask.cuda()], pack_words(mask).cuda(), row_pointers(mask).cuda()
    columns, device_mask = columns_of(mask).cuda(), mask.cuda()

    def run() -> list[torch.Tensor]:
        return [
            kernels.packed_linear_bitmap(x, *bitmap, None, 2000, "silu"),
            kernels.masked_matmul(x, weight, device_mask, None),
            kernels.sampled_matmul(grad, x, columns, bitmap[2]),
        ]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [run() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in repeats:
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_cuda_graph() -> None:
    mask = random_mask(70, 1100, 0.3)
    bitmap = torch.randn(int(mask.sum())).cuda(), pack_words(mask).cuda(), row_pointers(mask).cuda()
    x = torch.randn(5, 1100, device="cuda")
    expected = kernels.packed_linear_bitmap(x, *bitmap, None, 1100, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.packed_linear_bitmap(x, *bitmap, None, 1100, "relu")
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    with torch.cuda.device(0):
        check_packed_linear("cuda:1", (5, 70, 500), torch.float32)
        check_masked_matmul("cuda:1", (5, 70, 500), torch.float32)
        check_sampled_matmul("cuda:1", (5, 70, 500), torch.float32)
