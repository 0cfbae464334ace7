"""Which kernel runs, how to force one, and what is said when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sapwood
from sapwood import _backend
from sapwood.ops import pack_sparse


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 8), torch.randn(4, 8), torch.rand(4, 8) > 0.5


def test_explain_names_every_backend() -> None:
    explanation = sapwood.explain(sapwood.ops.masked_matmul, *arguments())
    reasons = {c.name: c.reason for c in explanation.candidates}
    assert explanation.chosen == "native"
    assert reasons["native"] is None
    assert reasons["triton"] in ("needs a CUDA device", "triton is not installed")
    assert reasons["reference"] == "can run, but native comes first"
    assert "native     will run" in str(explanation)


def test_explain_by_name_and_for_soft_masks() -> None:
    x, w, m = arguments()
    assert sapwood.explain("masked_matmul", x, w, m.float()).chosen == "dense"


def test_explain_packed_linear_gives_every_format_a_line() -> None:
    packed = pack_sparse(torch.randn(64, 64), torch.rand(64, 64) > 0.9, format="csr")
    explanation = sapwood.explain(sapwood.ops.packed_linear, torch.randn(2, 64), packed)
    assert explanation.chosen == "csr"
    assert len(explanation.candidates) == 4
    decision = sapwood.ops.explain(packed, 2)
    assert decision.reasons["bitmap"] == "not held by this packed weight"
    assert "will run" in str(decision)


def test_explain_refuses_what_is_not_an_op() -> None:
    with pytest.raises(ValueError, match=r"sapwood\.explain: op must be one of .*masked_matmul, "):
        sapwood.explain(len, 3)


def test_forcing_the_reference() -> None:
    x, w, m = arguments()
    native = sapwood.ops.masked_matmul(x, w, m)
    with sapwood.backend("reference"):
        assert sapwood.explain("masked_matmul", x, w, m).chosen == "reference"
        torch.testing.assert_close(sapwood.ops.masked_matmul(x, w, m), native)
    assert _backend.forced() == "auto"


@pytest.mark.parametrize("fmt", ["csr", "bitmap", "sell"])
def test_forcing_the_reference_of_packed_weights(fmt: str) -> None:
    packed, x = pack_sparse(torch.randn(9, 40), format=fmt), torch.randn(3, 40)
    native = sapwood.ops.packed_linear(x, packed)
    with sapwood.backend("reference"):
        torch.testing.assert_close(sapwood.ops.packed_linear(x, packed), native)
    with sapwood.backend("triton"), pytest.raises(RuntimeError, match=f"packed_linear_{fmt}"):
        sapwood.ops.packed_linear(x, packed)


def test_forced_backends_hold_for_gradients() -> None:
    packed = pack_sparse(torch.randn(9, 40), format="csr")
    x = torch.randn(3, 40, requires_grad=True)
    (native,) = torch.autograd.grad(sapwood.ops.packed_linear(x, packed).sum(), x)
    with sapwood.backend("reference"):
        (plain,) = torch.autograd.grad(sapwood.ops.packed_linear(x, packed).sum(), x)
        torch.testing.assert_close(plain, native)
    with sapwood.backend("triton"), pytest.raises(RuntimeError, match="packed_linear_csr"):
        sapwood.ops.packed_linear(x, packed)


def test_the_reference_refuses_a_dense_weight_gradient() -> None:
    with sapwood.backend("reference"), pytest.raises(RuntimeError, match="always masked"):
        sapwood.ops.masked_matmul(*arguments(), weight_grad="dense")


def test_forcing_what_cannot_run_gives_the_reason() -> None:
    with sapwood.backend("triton"), pytest.raises(RuntimeError) as caught:
        sapwood.ops.masked_matmul(*arguments())
    assert str(caught.value).startswith(
        "sapwood.masked_matmul: no backend can run this call (triton: "
    )
    with pytest.raises(ValueError, match="name must be one of auto, native, triton"):
        sapwood.backend("fastest").__enter__()


def test_reference_runs_on_any_device() -> None:
    """A device without kernels of its own reaches the reference by the dispatcher's default."""
    for name in ("masked_matmul", "packed_linear_csr", "sampled_matmul"):
        key = "CompositeExplicitAutograd"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sapwood::{name}", key)


def test_log_names_the_kernel_once() -> None:
    code = (
        "import torch, sapwood\n"
        "w = torch.randn(8, 8); p = sapwood.ops.pack_sparse(w, format='csr')\n"
        "for _ in range(3): sapwood.ops.packed_linear(torch.ones(2, 8), p)\n"
        "sapwood.ops.masked_matmul(torch.ones(2, 8), w, w > 0)\n"
    )
    env = {**os.environ, "SAPWOOD_LOG": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("sapwood.")]
    assert lines == [
        "sapwood.packed_linear_csr(torch.float32(2, 8)@cpu): native",
        "sapwood.masked_matmul(torch.float32(2, 8)@cpu, torch.float32(8, 8)@cpu, "
        "torch.bool(8, 8)@cpu): native",
    ]


def test_a_wrong_environment_is_refused() -> None:
    env = {**os.environ, "SAPWOOD_BACKEND": "quick"}
    run = subprocess.run(
        [sys.executable, "-c", "import sapwood.ops"], env=env, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "SAPWOOD_BACKEND must be one of auto, native" in run.stderr


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_results(capability: str) -> None:
    """One process each, since the variable is read once; the CPU's best has the suite itself."""
    env = {**os.environ, "SAPWOOD_CPU_CAPABILITY": capability}
    chosen = "test_forward or test_deterministic or test_batches or test_columns or test_half"
    files = ["tests/test_masked_matmul.py", "tests/test_packed_weight.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-k", chosen, *files],
        env=env,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout[-3000:]
