"""The launchers inside ``torch.library.triton_op``: traced, so neither GPU nor launch is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="triton is not installed")

from sapwood.triton_kernels import logsemiring
from sapwood.triton_kernels import masked_matmul as kernels
from sapwood.triton_kernels._launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")


def launches(function: Callable[..., Tensor], *args: Tensor) -> tuple[list[str], torch.Size]:
    """What a traced call launches, by the names of the outputs, and the shape of its result."""
    graph = make_fx(function, tracing_mode="symbolic")(*args).graph
    wrappers = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    result: Any = graph.output_node().args[0]
    return [str(node.kwargs["kwargs"]["out"]) for node in wrappers], result.meta["val"].shape


@pytest.mark.parametrize(("k", "count"), [(64, 1), (2048, 2)], ids=["whole", "split"])
def test_packed_linear(k: int, count: int) -> None:
    def call(x: Tensor, values: Tensor, words: Tensor, row_ptr: Tensor) -> Tensor:
        return kernels.packed_linear_bitmap(
            x, values, words, row_ptr, None, k, "gelu", wrap=torch.library.wrap_triton
        )

    row_ptr = torch.zeros(10, dtype=torch.int64)
    words = torch.zeros(9, k // 16, dtype=torch.int16)
    outputs, shape = launches(call, torch.zeros(5, k), torch.zeros(3), words, row_ptr)
    assert len(outputs) == count
    assert shape == (5, 9)


def test_masked_matmul() -> None:
    def call(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return kernels.masked_matmul(x, weight, mask, None, wrap=torch.library.wrap_triton)

    outputs, shape = launches(call, torch.zeros(5, 8), torch.zeros(9, 8), torch.zeros(9, 8) > 0)
    assert len(outputs) == 1
    assert shape == (5, 9)


def test_sampled_matmul() -> None:
    def call(grad: Tensor, x: Tensor, cols: Tensor, row_ptr: Tensor) -> Tensor:
        return kernels.sampled_matmul(grad, x, cols, row_ptr, wrap=torch.library.wrap_triton)

    cols, row_ptr = torch.zeros(7, dtype=torch.int16), torch.zeros(10, dtype=torch.int64)
    outputs, shape = launches(call, torch.zeros(5, 9), torch.zeros(5, 8), cols, row_ptr)
    assert len(outputs) == 1
    assert shape == (7,)


@pytest.mark.parametrize("exact", [True, False], ids=["term by term", "certified"])
def test_log_matmul(exact: bool) -> None:
    def call(a: Tensor, b: Tensor) -> Tensor:
        return logsemiring.log_matmul(a, b, exact, wrap=torch.library.wrap_triton)

    outputs, shape = launches(call, torch.zeros(3, 20, 30), torch.zeros(3, 30, 40))
    assert len(outputs) == 1
    assert shape == (3, 20, 40)
