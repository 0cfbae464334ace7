"""Packing, choosing a format, storing, and the errors of the packed path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sapwood
from sapwood.ops import PackedWeight, pack_sparse, packed_linear, unpack
from sapwood.ops.masked_matmul import FORMATS
from tests.check_op import layouts_of

BATCHES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 63, 64, 65, 257)
SPARSITIES = (0.0, 0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
COLUMNS = (127, 128, 129, 4096, 4097, 65536, 65537)


def weight_and_mask(n: int, k: int, sparsity: float) -> tuple[Tensor, Tensor]:
    return torch.randn(n, k), torch.rand(n, k) >= sparsity


def assert_product(x: Tensor, packed: PackedWeight, dense: Tensor, bias: Tensor | None) -> None:
    """Within 4 nnz_row eps sum|w||x| of float64, as any order of summation allows."""
    y = packed_linear(x, packed, bias)
    wide = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), dense.double().abs())
    terms = terms if bias is None else terms + bias.double().abs()
    per_row = (dense != 0).sum(1).clamp(min=1) + 1
    assert bool(((y.double() - wide).abs() <= 4 * per_row * 2.0**-24 * terms).all())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(fmt: str, batch: int) -> None:
    for sparsity in SPARSITIES:
        w, m = weight_and_mask(37, 100, sparsity)
        packed = pack_sparse(w, m, format=fmt)
        assert_product(torch.randn(batch, 100), packed, w.where(m, 0.0), torch.randn(37))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", COLUMNS)
def test_columns(fmt: str, k: int) -> None:
    w, m = weight_and_mask(19, k, 0.8)
    m[:, -1] = True  # column 65535 and 65536 are where 16 bits end
    for batch in (1, 20):
        assert_product(torch.randn(batch, k), pack_sparse(w, m, format=fmt), w.where(m, 0.0), None)


@given(
    n=st.integers(0, 65),
    k=st.integers(0, 65),
    batch=st.integers(0, 65),
    sparsity=st.sampled_from(SPARSITIES),
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_shape(n: int, k: int, batch: int, sparsity: float, fmt: str, seed: int) -> None:
    torch.manual_seed(seed)
    w, m = weight_and_mask(n, k, sparsity)
    packed = pack_sparse(w, m, format=fmt)
    assert torch.equal(unpack(packed), w.where(m, 0.0))
    x = torch.randn(batch, k)
    assert_product(x, packed, w.where(m, 0.0), torch.randn(n))
    expected = packed_linear(x, packed)
    for same in layouts_of(x).values():
        y = packed_linear(same, packed)
        if fmt == "dense":  # the platform's GEMM sums in an order that follows alignment
            torch.testing.assert_close(y, expected)
        else:
            assert torch.equal(y, expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_expanded_input(fmt: str) -> None:
    """Rows and columns of stride 0: nothing may be read at the wrong place, or written to."""
    w, m = weight_and_mask(37, 100, 0.7)
    packed = pack_sparse(w, m, format=fmt)
    for x in (torch.randn(1, 100).expand(20, 100), torch.randn(20, 1).expand(20, 100)):
        assert_product(x, packed, w.where(m, 0.0), None)
        masked = sapwood.ops.masked_matmul(x, w, m)
        torch.testing.assert_close(masked, F.linear(x, w.where(m, 0.0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_half_values_with_float_input(fmt: str, values: torch.dtype) -> None:
    w, m = weight_and_mask(37, 100, 0.7)
    packed = pack_sparse(w.to(values), m, format=fmt)
    for batch in (1, 5, 40):
        x = torch.randn(batch, 100)
        assert packed_linear(x, packed).dtype == torch.float32
        assert_product(x, packed, w.to(values).float().where(m, 0.0), None)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fused_activation_equals_separate(fmt: str) -> None:
    w, m = weight_and_mask(37, 100, 0.7)
    packed, x = pack_sparse(w, m, format=fmt), torch.randn(20, 100)
    for name, function in {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "silu": F.silu,
    }.items():
        y = packed_linear(x, packed, activation=name)
        torch.testing.assert_close(y, function(packed_linear(x, packed)), rtol=1e-5, atol=1e-6)


def test_pack_without_mask_keeps_the_non_zero_entries() -> None:
    w, m = weight_and_mask(20, 30, 0.6)
    packed = pack_sparse(w.where(m, 0.0))
    assert packed.nnz == int(m.sum())
    assert torch.equal(packed.mask(), m)
    assert packed.sparsity == pytest.approx(1 - packed.nnz / 600)


def test_denormals_are_flushed_when_packing() -> None:
    w = torch.tensor([[1e-40, 1.0, -1e-39]])
    assert unpack(pack_sparse(w)).tolist() == [[0.0, 1.0, 0.0]]
    half = torch.tensor([[1e-6, 1.0]], dtype=torch.float16)
    assert torch.equal(unpack(pack_sparse(half)), half)


def test_memory_of_each_format() -> None:
    w = torch.randn(1024, 1024)
    for sparsity, fmt, share in ((0.5, "bitmap", 0.54), (0.9, "csr", 0.16)):
        packed = pack_sparse(w, torch.rand_like(w) >= sparsity, format=fmt)
        assert packed.nbytes() <= share * w.nbytes, fmt
    half = pack_sparse(w, torch.rand_like(w) >= 0.5, keep="memory")
    assert half.formats == ("bitmap",)
    assert pack_sparse(w, torch.rand_like(w) >= 0.97, keep="memory").formats == ("csr",)
    assert pack_sparse(w, keep="memory").formats == ("dense",)


@pytest.mark.parametrize("fmt", FORMATS)
def test_safetensors_round_trip(fmt: str, tmp_path: Path) -> None:
    w, m = weight_and_mask(37, 100, 0.7)
    packed = pack_sparse(w, m, format=fmt)
    save_file(packed.tensors(), tmp_path / "packed.safetensors")
    loaded = PackedWeight.from_tensors(load_file(tmp_path / "packed.safetensors"))
    assert loaded.formats == packed.formats
    assert torch.equal(unpack(loaded), unpack(packed))
    x = torch.randn(3, 100)
    assert torch.equal(packed_linear(x, loaded), packed_linear(x, packed))


def test_formats_share_their_values(tmp_path: Path) -> None:
    w, m = weight_and_mask(64, 64, 0.5)
    both = PackedWeight(
        (64, 64),
        {f: dict(pack_sparse(w, m, format=f).layouts[f]) for f in ("csr", "bitmap")},
    )
    both.layouts["bitmap"]["values"] = both.layouts["csr"]["values"]
    save_file(both.tensors(), tmp_path / "both.safetensors")
    loaded = PackedWeight.from_tensors(load_file(tmp_path / "both.safetensors"))
    assert set(loaded.formats) == {"csr", "bitmap"}
    assert torch.equal(unpack(loaded), w.where(m, 0.0))


def corruptions() -> list[tuple[str, str, Any]]:
    return [
        ("csr", "csr.row_ptr", lambda t: t.flip(0)),
        ("csr", "csr.row_ptr", lambda t: t[:-1]),
        ("csr", "csr.cols", lambda t: t + 5000),
        ("csr", "csr.cols", lambda t: t.flip(0)),
        ("csr", "csr.cols", lambda t: t.long()),
        ("csr", "csr.values", lambda t: t[:-1]),
        ("csr", "csr.values", lambda t: t.int()),
        ("csr", "csr.row_order", lambda t: torch.zeros_like(t)),
        ("csr", "shape", lambda t: t[:1]),
        ("csr", "shape", lambda t: -t),
        ("csr", "shape", lambda t: t // 2),
        ("bitmap", "bitmap.words", lambda t: ~t),
        ("bitmap", "bitmap.words", lambda t: t[:, :-1]),
        ("bitmap", "bitmap.row_ptr", lambda t: t + 1),
        ("sell", "sell.index", lambda t: t + 32),
        ("sell", "sell.index", lambda t: torch.zeros_like(t)),
        ("sell", "sell.window", lambda t: t + 90),
        ("sell", "sell.window", lambda t: t - 1),
        ("sell", "sell.window", lambda t: torch.zeros_like(t)),
        ("sell", "sell.values", lambda t: t + 1),
        ("sell", "sell.slice_ptr", lambda t: t * 2),
        ("sell", "sell.slice_ptr", lambda t: t.flip(0)),
        ("dense", "dense.weight", lambda t: t[:1]),
    ]


@pytest.mark.parametrize(
    ("fmt", "name", "corrupt"),
    corruptions(),
    ids=[f"{c[1]}-{i}" for i, c in enumerate(corruptions())],
)
def test_corrupted_tensors_are_refused(fmt: str, name: str, corrupt: Any) -> None:
    tensors = pack_sparse(*weight_and_mask(37, 100, 0.7), format=fmt).tensors()
    tensors[name] = corrupt(tensors[name])
    with pytest.raises(ValueError, match=r"sapwood\.PackedWeight\.from_tensors: "):
        PackedWeight.from_tensors(tensors)


def test_missing_and_unknown_tensors_are_named() -> None:
    tensors = pack_sparse(torch.eye(4), format="csr").tensors()
    for change, message in (
        ({"csr.cols": None}, "tensor 'csr.cols' is missing"),
        ({"shape": None}, "tensor 'shape' is missing"),
        ({"csr.extra": torch.ones(1)}, "unknown tensor 'csr.extra'"),
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            PackedWeight.from_tensors(changed)
    with pytest.raises(ValueError, match="no format is present"):
        PackedWeight.from_tensors({"shape": torch.tensor([1, 1])})


def test_with_values_carries_gradients() -> None:
    w, m = weight_and_mask(12, 20, 0.5)
    packed = pack_sparse(w, m)
    values = packed.values.double().requires_grad_(True)
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        p = packed.to(torch.float64).with_values(values)
        return packed_linear(x, p, bias, activation="silu")

    assert torch.autograd.gradcheck(function, (x, values, bias))
    assert torch.autograd.gradgradcheck(function, (x, values, bias))


def test_sampled_matmul_is_the_gradient_at_kept_positions() -> None:
    w, m = weight_and_mask(12, 20, 0.5)
    packed = pack_sparse(w, m)
    x, g = torch.randn(3, 4, 20), torch.randn(3, 4, 12)
    expected = torch.einsum("abn,abk->nk", g, x)[m]
    torch.testing.assert_close(sapwood.ops.sampled_matmul(g, x, packed), expected)


def test_to_moves_dtype_and_keeps_structure() -> None:
    packed = pack_sparse(*weight_and_mask(12, 20, 0.5), format="csr")
    wide = packed.to(torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(unpack(wide), unpack(packed).double())
    with pytest.raises(TypeError, match=r"PackedWeight\.to: target must be a floating dtype"):
        packed.to(torch.int32)


def packed_errors() -> list[tuple[str, Any, type[Exception], str]]:
    x, packed = torch.ones(2, 8), pack_sparse(torch.ones(4, 8), format="csr")
    mask = torch.ones(4, 7, dtype=torch.bool)
    return [
        (
            "columns",
            lambda: packed_linear(torch.ones(2, 9), packed),
            ValueError,
            "packed_linear: input must have a last dimension of 8 (the packed weight's columns), "
            "got shape (2, 9)",
        ),
        (
            "dtype",
            lambda: packed_linear(x.double(), packed),
            TypeError,
            "packed_linear: input must be torch.float32, got torch.float64",
        ),
        (
            "bias",
            lambda: packed_linear(x, packed, torch.ones(3)),
            ValueError,
            "packed_linear: bias must have shape (4,), got (3,)",
        ),
        (
            "activation",
            lambda: packed_linear(x, packed, activation="elu"),
            ValueError,
            "packed_linear: activation must be one of none, relu, gelu, gelu_tanh, silu, got 'elu'",
        ),
        (
            "weight",
            lambda: packed_linear(x, torch.ones(4, 8)),
            TypeError,
            "packed_linear: packed must be a PackedWeight, got Tensor",
        ),
        (
            "format",
            lambda: pack_sparse(torch.ones(4, 8), format="coo"),
            ValueError,
            "pack_sparse: format must be one of auto, dense, bitmap, csr, sell, got 'coo'",
        ),
        (
            "keep",
            lambda: pack_sparse(torch.ones(4, 8), keep="all"),
            ValueError,
            "pack_sparse: keep must be one of speed, memory, got 'all'",
        ),
        (
            "mask",
            lambda: pack_sparse(torch.ones(4, 8), mask),
            ValueError,
            "pack_sparse: mask must have weight's shape (4, 8), got (4, 7)",
        ),
        (
            "mask dtype",
            lambda: pack_sparse(torch.ones(4, 8), torch.ones(4, 8)),
            TypeError,
            "pack_sparse: mask must be torch.bool or torch.uint8, got torch.float32",
        ),
        (
            "integer",
            lambda: pack_sparse(torch.ones(4, 8).int()),
            TypeError,
            "pack_sparse: weight must be floating point, got torch.int32",
        ),
        (
            "values",
            lambda: packed.with_values(torch.ones(3)),
            ValueError,
            "PackedWeight.with_values: values must have shape (32,), got (3,)",
        ),
        (
            "sampled",
            lambda: sapwood.ops.sampled_matmul(torch.ones(2, 5), x, packed),
            ValueError,
            "sampled_matmul: grad_output must have a last dimension of 4 "
            "(the packed weight's rows), got shape (2, 5)",
        ),
    ]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [c[1:] for c in packed_errors()],
    ids=[c[0] for c in packed_errors()],
)
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == f"sapwood.{message}"


def test_check_values_refuses_non_finite_input() -> None:
    packed = pack_sparse(torch.ones(4, 8), format="csr")
    x = torch.full((2, 8), float("nan"))
    packed_linear(x, packed)
    with sapwood.check_values(), pytest.raises(ValueError, match="input must be finite, got 16"):
        packed_linear(x, packed)


def test_vmap_of_pack_explains_itself() -> None:
    with pytest.raises(NotImplementedError, match="pack each weight outside of vmap"):
        torch.vmap(lambda w: torch.ops.sapwood.pack_csr(w, w != 0)[0])(torch.ones(2, 3, 4))


def test_fused_activation_has_no_raw_gradient() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    csr = tuple(pack_sparse(torch.ones(4, 8), format="csr").layouts["csr"].values())
    y = torch.ops.sapwood.packed_linear_csr(x, *csr, None, 8, "relu", None, None, None, None)
    with pytest.raises(NotImplementedError, match="no gradient through a fused relu"):
        y.sum().backward()


def test_compile_and_export_of_the_public_call() -> None:
    packed = pack_sparse(*weight_and_mask(12, 20, 0.5))
    x = torch.randn(6, 20)
    compiled = torch.compile(
        lambda x: packed_linear(x, packed, activation="relu"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), packed_linear(x, packed, activation="relu"))
