"""The CUDA kernels of copruned_conv, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation import copruned_conv_checks as checks
from tests.emulation import run_copruned_conv
from tests.emulation.copruned_conv_checks import DTYPES, PROBLEMS

by_problem = pytest.mark.parametrize("name", PROBLEMS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="session")
def ops(emulation_library: Path) -> Any:
    namespaces: Any = torch.ops
    namespaces.load_library(str(emulation_library))
    return namespaces.sapwood_emu


@by_problem
def test_forward(ops: Any, name: str) -> None:
    checks.check_forward(ops, PROBLEMS[name])


@by_problem
def test_backward(ops: Any, name: str) -> None:
    checks.check_backward(ops, PROBLEMS[name])


@by_dtype
@pytest.mark.parametrize("name", ["main", "depthwise"])
def test_dtypes(ops: Any, name: str, dtype: torch.dtype) -> None:
    checks.check_forward(ops, PROBLEMS[name], dtype)
    checks.check_backward(ops, PROBLEMS[name], dtype)


@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (128,), (129,), (3, 50, 7)], ids=str)
@pytest.mark.parametrize("share", [-1.0, 0.4, 1.1])
def test_list(ops: Any, shape: tuple[int, ...], share: float) -> None:
    checks.check_list(ops, torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share)


def test_a_strided_weight_is_read_where_it_lies(ops: Any) -> None:
    p = PROBLEMS["main"]
    x, weight, *rest = p.tensors(torch.float32, "cpu")
    assert weight is not None
    packed = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    wanted = ops.copruned_conv2d(x, weight, *rest, *p.options, "none")
    assert torch.equal(ops.copruned_conv2d(x, packed, *rest, *p.options, "none"), wanted)


def test_twenty_runs_are_bitwise_equal(ops: Any) -> None:
    first = run_copruned_conv.run(ops, run_copruned_conv.REPEATED)
    for _ in range(19):
        assert run_copruned_conv.run(ops, run_copruned_conv.REPEATED) == first


def test_results_do_not_depend_on_the_order_of_blocks(ops: Any, emulation_library: Path) -> None:
    shuffled = emulation_library.with_name("_ops_emu_shuffled.so")
    if not shuffled.is_file():
        pytest.fail(f"{shuffled.name} is missing: build it with 'make emulation'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulation.run_copruned_conv", str(shuffled)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert json.loads(done.stdout) == run_copruned_conv.run(ops, run_copruned_conv.ALL)


X, W = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)
ONES = [1, 1]
OPTIONS = (ONES, ONES, ONES, 1, 2, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, "input must have 4 dimensions, got shape (8, 4, 4)"),
        ({"weight": W.double()}, "weight must be of input's dtype, got Double"),
        ({"weight": W[:, :4]}, "weight must have shape (8, 8, 3, 3), got (8, 4, 3, 3)"),
        ({"bias": torch.ones(3)}, "bias must have shape (8,), got (3,)"),
        ({"region": torch.ones(1, 2, 1).bool()}, "region must have shape (1, 2, 2), got (1, 2, 1)"),
        ({"filters": torch.ones(1, 2).bool()}, "filters must have shape (1, 1), got (1, 2)"),
        ({"input_filters": torch.ones(1, 1)}, "input_filters must be bool, got Float"),
        ({"residual": X[:, :4]}, "residual must have shape (1, 8, 4, 4), got (1, 4, 4, 4)"),
        (
            {"activation": "tanh"},
            "activation must be one of none, relu, gelu, silu, leaky_relu, got",
        ),
        ({"groups": 2}, "groups must be 1 or the number of channels and filters, got 2"),
        ({"stride": [1]}, "stride, padding and dilation must have 2 entries"),
        ({"stride": [0, 1]}, "stride and dilation must be at least 1 and padding at least 0"),
        (
            {"filter_group": 16, "filters": torch.ones(1, 1).bool()},
            "must divide the filters 8, got 16",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_inconsistent_arguments_are_refused(
    ops: Any, changed: dict[str, Any], message: str
) -> None:
    names = ("x", "weight", "bias", "region", "filters", "input_filters", "residual")
    sizes = ("stride", "padding", "dilation", "groups", "tile", "filter_group")
    given: dict[str, Any] = dict.fromkeys(names) | {"x": X, "weight": W}
    given |= dict(zip(sizes, OPTIONS, strict=True)) | {"activation": "none"} | changed
    for namespace in (ops, torch.ops.sapwood):
        with pytest.raises(RuntimeError) as raised:
            namespace.copruned_conv2d(*given.values())
        assert message in str(raised.value)
