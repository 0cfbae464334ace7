"""The CUDA kernels of masked_matmul, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.reference import masked_matmul as reference
from tests.emulation import checks, run_cases
from tests.emulation.checks import ACTIVATIONS, DENSITIES, DTYPES, SHAPES, Shape, problem

MAIN: Shape = (3, 17, 65)
PANEL: Shape = (33, 9, 48)
BATCHES = (1, 3, 8, 12, 40)  # each picks another kernel

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
by_format = pytest.mark.parametrize("fmt", ["csr", "bitmap"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@by_shape
def test_masked_matmul(ops: Any, shape: Shape) -> None:
    checks.check_masked_matmul(ops, problem(shape))


@by_dtype
def test_masked_matmul_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_masked_matmul(ops, problem(MAIN, dtype=dtype))


@by_shape
def test_packing(ops: Any, shape: Shape) -> None:
    checks.check_packing(ops, reference, problem(shape))


@pytest.mark.parametrize("density", DENSITIES)
def test_packing_density(ops: Any, density: float) -> None:
    checks.check_packing(ops, reference, problem(MAIN, density))


@by_dtype
def test_packing_dtype(ops: Any, dtype: torch.dtype) -> None:
    checks.check_packing(ops, reference, problem(MAIN, dtype=dtype))


@by_format
@by_shape
def test_packed_linear(ops: Any, shape: Shape, fmt: str) -> None:
    checks.check_packed_linear(ops, reference, fmt, problem(shape))


@by_format
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [MAIN, PANEL], ids=["gather", "panel"])
def test_packed_linear_density(ops: Any, shape: Shape, density: float, fmt: str) -> None:
    checks.check_packed_linear(ops, reference, fmt, problem(shape, density), bias=False)


@by_format
@by_dtype
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_linear_dtype(ops: Any, batch: int, dtype: torch.dtype, fmt: str) -> None:
    checks.check_packed_linear(ops, reference, fmt, problem((batch, 6, 70), dtype=dtype))


@by_format
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_half_values_under_float32(ops: Any, batch: int, values: torch.dtype, fmt: str) -> None:
    p = problem((batch, 6, 70))
    checks.check_packed_linear(ops, reference, fmt, p, value_dtype=values)


@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(ops: Any, activation: str, dtype: torch.dtype, fmt: str) -> None:
    p = problem((2, 6, 40), dtype=dtype)
    checks.check_packed_linear(ops, reference, fmt, p, activation=activation)


@by_shape
def test_sampled_matmul(ops: Any, shape: Shape) -> None:
    checks.check_sampled_matmul(ops, reference, problem(shape))


@by_dtype
@pytest.mark.parametrize("shape", [MAIN, PANEL], ids=["lane", "panel"])
def test_sampled_matmul_dtype(ops: Any, shape: Shape, dtype: torch.dtype) -> None:
    checks.check_sampled_matmul(ops, reference, problem(shape, dtype=dtype))


@pytest.mark.parametrize("k", [65536, 65537], ids=["uint16", "int32"])
def test_column_indices_at_the_uint16_limit(ops: Any, k: int) -> None:
    mask = torch.zeros(1, k, dtype=torch.bool)
    mask[0, [0, 32768, 65535, k - 1]] = True
    weight, x = torch.randn(1, k), torch.randn(2, k)
    packed = reference.pack_csr(weight, mask)
    for got, wanted in zip(ops.pack_csr(weight, mask), packed, strict=True):
        assert torch.equal(got, wanted)
    y = ops.packed_linear_csr(x, *packed, None, k, "none", *checks.UNTRANSPOSED)
    kept = (weight * mask).double().T
    checks.assert_sums(y, x.double() @ kept, x.double().abs() @ kept.abs(), 4, x.dtype)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same matrix in memory orders that a caller may hold."""
    rows, columns = t.shape
    gaps = torch.empty(2 * rows, 3 * columns + 1, dtype=t.dtype)[::2, 1::3]
    offset = torch.empty(rows * columns + 1, dtype=t.dtype)[1:].view(rows, columns)
    return {
        "transposed": t.T.contiguous().T,
        "gaps": gaps.copy_(t),
        "offset": offset.copy_(t),
    }


@pytest.mark.parametrize("shape", [(3, 6, 40), (12, 6, 40)], ids=["gather", "panel"])
def test_layouts_are_bitwise_equal(ops: Any, shape: Shape) -> None:
    p = problem(shape)
    _, cols, row_ptr, _ = reference.pack_csr(p.weight, p.mask)
    sampled = ops.sampled_matmul(p.grad, p.x, cols, row_ptr)
    expected = {f: checks.packed_linear(ops, reference, f, p) for f in ("csr", "bitmap")}
    for name, x in layouts(p.x).items():
        q = checks.Problem(x, p.weight, p.mask, p.bias, p.grad)
        for fmt, wanted in expected.items():
            assert torch.equal(checks.packed_linear(ops, reference, fmt, q), wanted), (name, fmt)
        grad = layouts(p.grad)[name]
        assert torch.equal(ops.sampled_matmul(grad, x, cols, row_ptr), sampled), name


@by_dtype
def test_layouts_of_weight_and_mask(ops: Any, dtype: torch.dtype) -> None:
    p = problem((2, 5, 34), dtype=dtype)
    masks = layouts(p.mask)
    for name, weight in layouts(p.weight).items():
        q = checks.Problem(p.x, weight, masks[name], p.bias, p.grad)
        checks.check_packing(ops, reference, q)
        checks.check_masked_matmul(ops, q)


def test_expanded_inputs(ops: Any) -> None:
    p = problem((5, 6, 40))
    q = checks.Problem(
        p.x[:1].expand(12, 40), p.weight, p.mask, p.bias[:1].expand(6), p.grad[:1, :1].expand(12, 6)
    )
    for fmt in ("csr", "bitmap"):
        checks.check_packed_linear(ops, reference, fmt, q)
    checks.check_sampled_matmul(ops, reference, q)
    checks.check_masked_matmul(ops, q)


@by_format
def test_infinite_inputs_off_the_mask_do_not_show(ops: Any, fmt: str) -> None:
    p = problem((2, 4, 70))
    p.mask[:, [3, 69]] = False
    p.x[:, [3, 69]] = float("inf")
    assert torch.isfinite(checks.packed_linear(ops, reference, fmt, p)).all()


@by_format
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_inputs_stay_nan(ops: Any, activation: str, fmt: str) -> None:
    p = problem((2, 4, 20), density=1.0)
    p.x[0, 7] = float("nan")
    y = checks.packed_linear(ops, reference, fmt, p, activation=activation)
    assert torch.isnan(y[0]).all()
    assert torch.isfinite(y[1]).all()


def test_twenty_runs_are_bitwise_equal(ops: Any) -> None:
    first = run_cases.run(ops, run_cases.REPEATED)
    for _ in range(19):
        assert run_cases.run(ops, run_cases.REPEATED) == first


def test_results_do_not_depend_on_the_order_of_blocks(ops: Any, emulation_library: Path) -> None:
    shuffled = emulation_library.with_name("_ops_emu_shuffled.so")
    if not shuffled.is_file():
        pytest.fail(f"{shuffled.name} is missing: build it with 'make emulation'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulation.run_cases", str(shuffled)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert json.loads(done.stdout) == run_cases.run(ops, run_cases.ALL)


def test_calls_from_several_threads(ops: Any) -> None:
    wanted = run_cases.run(ops, run_cases.REPEATED)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run_cases.run(ops, run_cases.REPEATED), range(4)))
    assert results == [wanted] * 4


def corrupted(p: checks.Problem) -> dict[str, tuple[str, list[Any], str]]:
    """Calls that would read out of bounds, and what the op says instead."""
    values, cols, row_ptr, row_order = reference.pack_csr(p.weight, p.mask)
    _, words, _ = reference.pack_bitmap(p.weight, p.mask)
    csr = [p.x, values, cols, row_ptr, row_order, p.bias, p.k, "none", *checks.UNTRANSPOSED]
    bitmap = [p.x, values, words, row_ptr, p.bias, p.k, "none"]

    def but(args: list[Any], **changes: Any) -> list[Any]:
        return [changes.get(f"at{i}", a) for i, a in enumerate(args)]

    return {
        "mask": (
            "pack_csr",
            [p.weight, p.mask[:, 1:]],
            "pack_csr: mask must have shape (4, 20), got (4, 19)",
        ),
        "mask dtype": (
            "pack_bitmap",
            [p.weight, p.mask.float()],
            "pack_bitmap: mask must be bool or uint8, got Float",
        ),
        "weight dtype": (
            "pack_csr",
            [p.weight.nan_to_num().to(torch.int8), p.mask],
            "pack_csr: weight must be float32, float64, float16 or bfloat16, got Char",
        ),
        "x": (
            "packed_linear_csr",
            but(csr, at0=p.x[:, 1:]),
            "packed_linear_csr: x must have shape (3, 20), got (3, 19)",
        ),
        "x rank": (
            "packed_linear_csr",
            but(csr, at0=p.x[0]),
            "packed_linear_csr: x must have 2 dimensions, got shape (20,)",
        ),
        "values": (
            "packed_linear_csr",
            but(csr, at1=values[1:]),
            f"packed_linear_csr: values must have shape ({len(values)},), got ({len(values) - 1},)",
        ),
        "values dtype": (
            "packed_linear_csr",
            but(csr, at1=values.double()),
            "packed_linear_csr: values must be of x's dtype",
        ),
        "cols dtype": (
            "packed_linear_csr",
            but(csr, at2=cols.int()),
            "packed_linear_csr: cols must be int16 for at most 65536 columns, got Int",
        ),
        "row_ptr dtype": (
            "packed_linear_csr",
            but(csr, at3=row_ptr.int()),
            "packed_linear_csr: row_ptr must be int64, got Int",
        ),
        "row_order": (
            "packed_linear_csr",
            but(csr, at4=row_order[1:]),
            "packed_linear_csr: row_order must have shape (4,), got (3,)",
        ),
        "bias": (
            "packed_linear_csr",
            but(csr, at5=p.bias[1:]),
            "packed_linear_csr: bias must have shape (4,), got (3,)",
        ),
        "activation": (
            "packed_linear_csr",
            but(csr, at7="tanh"),
            "packed_linear_csr: activation must be one of none, relu, gelu, gelu_tanh, "
            "silu, got tanh",
        ),
        "words": (
            "packed_linear_bitmap",
            but(bitmap, at2=words[:, 1:]),
            "packed_linear_bitmap: words must have shape (4, 2), got (4, 1)",
        ),
        "bitmap row_ptr": (
            "packed_linear_bitmap",
            but(bitmap, at3=row_ptr[1:]),
            "packed_linear_bitmap: row_ptr must have shape (5,), got (4,)",
        ),
        "integer x": (
            "packed_linear_bitmap",
            but(bitmap, at0=p.x.int(), at4=None),
            "packed_linear_bitmap: x must be float32, float64, float16 or bfloat16, got Int",
        ),
        "grad": (
            "sampled_matmul",
            [p.grad[1:], p.x, cols, row_ptr],
            "sampled_matmul: grad must have shape (3, 4), got (2, 4)",
        ),
        "empty row_ptr": (
            "sampled_matmul",
            [p.grad, p.x, cols, row_ptr[:0]],
            "sampled_matmul: row_ptr must not be empty, got (0,)",
        ),
        "k": ("transpose_csr", [cols, row_ptr, -1], "transpose_csr: k must be at least 0, got -1"),
    }


@pytest.mark.parametrize("case", corrupted(problem((3, 4, 20))))
def test_inconsistent_arguments_are_refused(ops: Any, case: str) -> None:
    op, args, message = corrupted(problem((3, 4, 20)))[case]
    with pytest.raises(RuntimeError) as raised:
        getattr(ops, op)(*args)
    assert f"sapwood.{message}" in str(raised.value)
