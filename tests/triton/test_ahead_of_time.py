"""Compiles every kernel for every supported generation of GPUs; needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from sapwood.triton_kernels import (  # noqa: E402
    copruned_conv,
    logsemiring,
    masked_matmul,
    similarity,
    splat2d,
)
from sapwood.triton_kernels._launch import INTERPRETED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")

CAPABILITIES = (80, 87, 90, 110, 120)
SHARED_BYTES = 99 * 1024  # what a block may use on the smallest of them
ALIGNED = [["tt.divisibility", 16]]
MODULES = (copruned_conv, logsemiring, masked_matmul, similarity, splat2d)


def kernels() -> dict[str, list[Any]]:
    """The cases by kernel name."""
    cases: dict[str, list[Any]] = {}
    for case in (case for module in MODULES for case in module.AOT_CASES):
        cases.setdefault(case[0].__name__, []).append(case)
    return cases


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", kernels())
def test_compiles(name: str, capability: int) -> None:
    for kernel, signature, constexprs, options in kernels()[name]:
        # As aligned as allocations and round sizes are: most vectorised, most shared memory.
        attributes = {
            (i,): ALIGNED for i, a in enumerate(kernel.arg_names) if signature[a] != "constexpr"
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("name", kernels())
def test_compiles_for_unaligned_strided_tensors(name: str) -> None:
    kernel, signature, constexprs, options = kernels()[name][-1]
    fixed = {a: value for a, value in constexprs.items() if not a.startswith("stride_")}
    types = {a: "i64" if a.startswith("stride_") else t for a, t in signature.items()}
    source = ASTSource(kernel, types, fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES


def test_every_kernel_and_configuration_is_a_case() -> None:
    names = {name for module in MODULES for name in dir(module) if name.endswith("_kernel")}
    assert set(kernels()) == names
    compiled = {
        (c[0].__name__, *(c[2][a] for a in c[0].arg_names if a.startswith("BLOCK_")))
        for c in (case for module in MODULES for case in module.AOT_CASES)
    }
    tables = {
        "packed_linear_kernel": [*masked_matmul._PACKED.values()],
        "masked_matmul_kernel": [*masked_matmul._MASKED.values()],
        "sampled_matmul_kernel": [masked_matmul._SAMPLED],
        "candidates_kernel": [similarity._CONFIG],
        "log_product_kernel": [logsemiring._PRODUCT],
        "log_gradient_kernel": [logsemiring._PRODUCT],
        "max_product_kernel": [logsemiring._TROPICAL],
        "draw_kernel": [logsemiring._DRAW],
        "segment_sums_kernel": [logsemiring._SEGMENT],
        "chain_kernel": [logsemiring._CHAIN],
        "chain_gradient_kernel": [logsemiring._CHAIN],
        "maxima_kernel": [similarity._CONFIG],
        "join_kernel": [{"": similarity._JOIN}],
        "splat2d_kernel": [{0: splat2d._DRAW}],
        "splat2d_backward_kernel": [{0: splat2d._DIFFERENTIATE}],
        "copruned_conv_kernel": [copruned_conv._CONFIG],
    }
    for name, group in tables.items():
        for config in (config for table in group for config in table.values()):
            assert (name, *config.tile.values()) in compiled


def test_popcount_is_one_instruction() -> None:
    case = next(c for c in masked_matmul.AOT_CASES if c[0].__name__ == "packed_linear_kernel")
    kernel, signature, constexprs, options = case
    source = ASTSource(kernel, signature, constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert "popc.b32" in compiled.asm["ptx"]
