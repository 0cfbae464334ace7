"""The CUDA kernels of masked_matmul on a device: the samples of the emulation, then larger ones,
streams, CUDA graphs and devices other than the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sapwood  # noqa: F401  loads the ops
from sapwood.reference import masked_matmul as reference
from tests.emulation import checks
from tests.emulation.checks import ACTIVATIONS, DENSITIES, DTYPES, SHAPES, Shape, problem

pytestmark = pytest.mark.gpu

LARGE: list[Shape] = [
    (1, 2048, 2048),
    (8, 1000, 4097),
    (64, 2048, 2048),
    (257, 777, 1000),
    (20, 3, 65537),
]
BATCHES = (1, 8, 16, 64, 200)

by_shape = pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "x".join(map(str, s)))
by_format = pytest.mark.parametrize("fmt", ["csr", "bitmap"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
ops: Any = torch.ops.sapwood


@pytest.fixture(autouse=True)
def _float32_accumulation() -> Iterator[None]:
    """The bounds hold for dense products that accumulate in float32."""
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


@by_dtype
@by_shape
def test_masked_matmul(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_masked_matmul(ops, problem(shape, dtype=dtype, device="cuda"))


@by_dtype
@by_shape
def test_packing(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_packing(ops, reference, problem(shape, dtype=dtype, device="cuda"))


@by_format
@by_dtype
@by_shape
def test_packed_linear(shape: Shape, dtype: torch.dtype, fmt: str) -> None:
    p = problem(shape, dtype=dtype, device="cuda")
    checks.check_packed_linear(ops, reference, fmt, p)


@by_format
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_linear_density(batch: int, density: float, fmt: str) -> None:
    p = problem((batch, 300, 1100), density, device="cuda")
    checks.check_packed_linear(ops, reference, fmt, p, bias=False)


@by_format
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_activation(batch: int, activation: str, fmt: str) -> None:
    p = problem((batch, 300, 1100), device="cuda")
    checks.check_packed_linear(ops, reference, fmt, p, activation=activation)


@by_format
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_half_values_under_float32(batch: int, values: torch.dtype, fmt: str) -> None:
    p = problem((batch, 70, 500), device="cuda")
    checks.check_packed_linear(ops, reference, fmt, p, value_dtype=values)


@by_dtype
@by_shape
def test_sampled_matmul(shape: Shape, dtype: torch.dtype) -> None:
    checks.check_sampled_matmul(ops, reference, problem(shape, dtype=dtype, device="cuda"))


def products(batch: int, device: str = "cuda") -> tuple[checks.Problem, Callable[[], list[Tensor]]]:
    """The ops that promise not to synchronise, with their index tensors already built."""
    p = problem((batch, 500, 1000), device=device)
    p.weight.nan_to_num_()
    csr = reference.pack_csr(p.weight, p.mask)
    bitmap = reference.pack_bitmap(p.weight, p.mask)

    def run() -> list[Tensor]:
        return [
            ops.packed_linear_csr(p.x, *csr, p.bias, p.k, "silu", *checks.UNTRANSPOSED),
            ops.packed_linear_bitmap(p.x, *bitmap, p.bias, p.k, "silu"),
            ops.sampled_matmul(p.grad, p.x, csr[1], csr[2]),
            ops.masked_matmul(p.x, p.weight, p.mask, p.bias, False),
        ]

    return p, run


@pytest.mark.parametrize("batch", BATCHES)
def test_repeats_bitwise(batch: int) -> None:
    _, run = products(batch)
    first = run()
    for _ in range(19):
        for again, wanted in zip(run(), first, strict=True):
            assert torch.equal(again, wanted)


@pytest.mark.parametrize("batch", BATCHES)
def test_runs_on_the_current_stream_without_synchronising(batch: int) -> None:
    p, run = products(batch)
    run()  # loads the kernels, which synchronises
    later = torch.randn_like(p.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        p.x.copy_(later)
        got = run()
        assert not stream.query(), "an op waited for the stream"
    torch.cuda.synchronize()
    for result, wanted in zip(got, run(), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("batch", BATCHES)
def test_cuda_graph_replays_with_new_inputs(batch: int) -> None:
    p, run = products(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        p.x.copy_(torch.randn_like(p.x))
        p.grad.copy_(torch.randn_like(p.grad))
        graph.replay()
        torch.cuda.synchronize()
        for result, wanted in zip(captured, run(), strict=True):
            assert torch.equal(result, wanted)


def test_runs_on_the_device_of_its_tensors() -> None:
    device = f"cuda:{torch.cuda.device_count() - 1}"
    _, run = products(16, device)
    _, run_on_first = products(16, "cuda:0")
    for result, wanted in zip(run(), run_on_first(), strict=True):
        assert str(result.device) == device
        torch.testing.assert_close(result.cpu(), wanted.cpu(), rtol=1e-5, atol=1e-4)
    assert torch.cuda.current_device() == 0


def test_mixed_devices_are_refused() -> None:
    p = problem((2, 4, 20), device="cuda")
    with pytest.raises(RuntimeError) as raised:
        ops.pack_csr(p.weight, p.mask.cpu())
    assert "sapwood.pack_csr: weight is on cuda:0 but mask is on cpu" in str(raised.value)


def test_offsets_beyond_32_bits() -> None:
    """x alone has more than 2^31 elements; the last panel must be as right as the first."""
    k, batch = 2**16, 2**15 + 64
    needed = 2 * batch * k * 2 + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    x = torch.zeros(batch, k, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    mask = torch.zeros(3, k, dtype=torch.bool, device="cuda")
    mask[1, -5:] = True
    packed = reference.pack_csr(mask.to(x.dtype), mask)
    y = ops.packed_linear_csr(x, *packed, None, k, "none", *checks.UNTRANSPOSED)
    assert y[-1].tolist() == [0, 5, 0]
    assert not y[:-1].any()
