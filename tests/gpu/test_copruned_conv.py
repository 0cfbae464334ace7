"""The CUDA kernels of copruned_conv on a device: the emulation's samples, larger ones, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sapwood
from tests.emulation import copruned_conv_checks as checks
from tests.emulation.copruned_conv_checks import DTYPES, PROBLEMS, Problem

pytestmark = pytest.mark.gpu

LARGE = {
    "64": Problem(batch=8, channels=64, filters=64, size=(56, 56), tile=8, group=16, regions=0.3),
    "256": Problem(batch=3, channels=256, filters=256, size=(28, 28), tile=4, group=32),
}
ALL = {**PROBLEMS, **LARGE}
ops: Any = torch.ops.sapwood


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ALL)
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    checks.check_forward(ops, ALL[name], dtype, "cuda")
    checks.check_backward(ops, ALL[name], dtype, "cuda")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_list(share: float) -> None:
    checks.check_list(ops, torch.rand(7, 100, 31, device="cuda") < share)


def test_nothing_waits_for_the_device() -> None:
    tensors = LARGE["64"].tensors(torch.float32, "cuda")
    x, w, b, region, filters, *_ = tensors
    sapwood.ops.copruned_conv2d(x, w, b, region, filters, padding=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sapwood.ops.copruned_conv2d(x, w, b, region, filters, padding=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_masks() -> None:
    x, w, b, region, filters, *_ = LARGE["64"].tensors(torch.float32, "cuda")
    assert region is not None

    def convolve() -> torch.Tensor:
        return sapwood.ops.copruned_conv2d(x, w, b, region, filters, padding=1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        convolve()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = convolve()
    for share in (0.1, 0.9):
        region.copy_(torch.rand_like(region, dtype=torch.float32) < share)
        graph.replay()
        assert torch.equal(y, convolve())
