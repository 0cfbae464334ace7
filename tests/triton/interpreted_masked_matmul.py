"""The kernels on CPU tensors in Triton's interpreter; ``test_interpreter.py`` runs this file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sapwood.triton_kernels import masked_matmul as kernels
from sapwood.triton_kernels import why_not
from torch import Tensor

from .masked_matmul_checks import (
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

# exp(-x) of a very negative x is inf on purpose: x / inf is the activation's limit, 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

FAR = 2**31  # elements apart: an offset that 32 bits cannot hold


def shapes(*groups: tuple[tuple[int, int, int], ...]) -> pytest.MarkDecorator:
    every = [shape for group in groups for shape in group]
    return pytest.mark.parametrize("shape", every, ids=lambda s: "x".join(map(str, s)))


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def views_of(x: Tensor) -> dict[str, Tensor]:
    """Equal values in other layouts."""
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 1), torch.nan, dtype=x.dtype)
    wide[:, 1::2] = x
    return {"transposed": x.t().contiguous().t(), "sliced": wide[:, 1::2]}


def packed(mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight[mask], pack_words(mask), row_pointers(mask)


@by_dtype
@shapes(SHAPES, SPLIT_SHAPES)
def test_packed_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_packed_linear("cpu", shape, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 9, 40), (6, 9, 40), (5, 6, 1100)], ids=["vector", "dot", "split"]
)
def test_packed_linear_activation(shape: tuple[int, int, int], activation: str) -> None:
    check_packed_linear("cpu", shape, torch.float32, activation=activation)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_packed_linear_extreme_density(batch: int, density: float) -> None:
    check_packed_linear("cpu", (batch, 7, 50), torch.float32, density=density)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, 4])
def test_packed_linear_half_values(batch: int, value_dtype: torch.dtype) -> None:
    check_packed_linear("cpu", (batch, 7, 50), torch.float32, value_dtype=value_dtype)


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_packed_linear_without_bias(batch: int) -> None:
    check_packed_linear("cpu", (batch, 7, 600), torch.float32, with_bias=False)


@pytest.mark.parametrize("batch", [1, 4])
def test_packed_linear_layouts_agree(batch: int) -> None:
    mask, x = random_mask(7, 40, 0.4), torch.randn(batch, 40)
    structure = packed(mask, torch.randn(7, 40))
    contiguous = kernels.packed_linear_bitmap(x, *structure, None, 40, "none")
    for name, view in views_of(x).items():
        result = kernels.packed_linear_bitmap(view, *structure, None, 40, "none")
        assert torch.equal(result, contiguous), name
    expanded = kernels.packed_linear_bitmap(x[:1].expand(5, -1), *structure, None, 40, "none")
    assert torch.equal(expanded, expanded[:1].expand(5, -1))
    torch.testing.assert_close(expanded[0], contiguous[0])


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_packed_linear_keeps_nan(activation: str) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    structure = packed(mask, torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]))
    y = kernels.packed_linear_bitmap(torch.ones(1, 3), *structure, None, 3, activation)
    assert y.isnan().tolist() == [[False, True]]


def test_packed_linear_unknown_activation() -> None:
    structure = packed(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1))
    with pytest.raises(Exception, match="unknown activation"):
        kernels.packed_linear_bitmap(torch.ones(1, 1), *structure, None, 1, "selu")


def test_packed_linear_values_beyond_32_bits() -> None:
    values = torch.empty(FAR + 8, dtype=torch.float16)  # only the touched pages exist
    values[FAR : FAR + 6] = torch.arange(1.0, 7.0).half()
    mask = torch.ones(2, 3, dtype=torch.bool)
    row_ptr = row_pointers(mask) + FAR
    x = torch.ones(1, 3, dtype=torch.float16)
    y = kernels.packed_linear_bitmap(x, values, pack_words(mask), row_ptr, None, 3, "none")
    assert y.tolist() == [[6.0, 15.0]]


@by_dtype
@shapes(SHAPES, ((20, 40, 1541),))
def test_masked_matmul(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_masked_matmul("cpu", shape, dtype)


def test_masked_matmul_without_bias() -> None:
    check_masked_matmul("cpu", (7, 9, 20), torch.float32, with_bias=False)


def test_masked_matmul_layouts_agree() -> None:
    x, weight, mask = torch.randn(5, 40), torch.randn(7, 40), random_mask(7, 40, 0.4)
    contiguous = kernels.masked_matmul(x, weight, mask, None)
    for name, view in views_of(x).items():
        assert torch.equal(kernels.masked_matmul(view, weight, mask, None), contiguous), name
    for name, view in views_of(weight).items():
        assert torch.equal(kernels.masked_matmul(x, view, mask, None), contiguous), name
    transposed = kernels.masked_matmul(x, weight, mask.t().contiguous().t(), None)
    assert torch.equal(transposed, contiguous)
    assert torch.equal(kernels.masked_matmul(x, weight, mask.byte() * 3, None), contiguous)
    expanded = kernels.masked_matmul(x, weight, mask[1:2].expand(7, -1), None)
    assert torch.equal(expanded, kernels.masked_matmul(x, weight, mask[1:2].repeat(7, 1), None))


def test_masked_matmul_all_masked_is_the_bias() -> None:
    weight = torch.full((9, 33), torch.inf)
    bias = torch.randn(9)
    y = kernels.masked_matmul(torch.randn(4, 33), weight, torch.zeros(9, 33).bool(), bias)
    assert torch.equal(y, bias.expand(4, 9))


def test_masked_matmul_of_the_transposes_is_the_gradient_of_x() -> None:
    grad, weight, mask = torch.randn(6, 9), torch.randn(9, 20), random_mask(9, 20, 0.4)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    F.linear(x, torch.where(mask, weight, 0).double()).backward(grad.double())
    assert x.grad is not None
    result = kernels.masked_matmul(grad, weight.t(), mask.t(), None)
    torch.testing.assert_close(result, x.grad.float())


def test_masked_matmul_rows_beyond_32_bits() -> None:
    # Each stride fits in 32 bits, the last row's offset does not.
    weight = torch.empty(FAR + 4, dtype=torch.float16).as_strided((3, 4), (FAR // 2, 1))
    mask = torch.empty(FAR + 4, dtype=torch.uint8).as_strided((3, 4), (FAR // 2, 1))
    weight[:] = torch.tensor([[1], [2], [3]])
    mask[:] = torch.tensor([1, 0, 1, 0])
    x, dense_mask = weight.clone(), mask.clone()
    expected = [[2.0, 4, 6], [4, 8, 12], [6, 12, 18]]
    assert kernels.masked_matmul(x, weight, dense_mask, None).tolist() == expected
    assert kernels.masked_matmul(x, x, mask, None).tolist() == expected
    assert kernels.masked_matmul(weight, x, dense_mask, None).tolist() == expected


def test_sampled_matmul_batch_beyond_32_bits() -> None:
    grad = torch.empty(FAR + 2, dtype=torch.float16).as_strided((3, 2), (FAR // 2, 1))
    grad[:] = torch.tensor([[1], [2], [4]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    x = torch.ones(3, 1, dtype=torch.float16)
    result = kernels.sampled_matmul(grad, x, columns_of(mask), row_pointers(mask))
    assert result.tolist() == [7.0, 7.0]


@by_dtype
@shapes(SHAPES)
def test_sampled_matmul(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_sampled_matmul("cpu", shape, dtype)


def test_sampled_matmul_wide_columns() -> None:
    check_sampled_matmul("cpu", (3, 4, 40), torch.float32, torch.int32)


def test_sampled_matmul_last_column_of_16_bits() -> None:
    columns = torch.tensor([0, 32767, 32768, 65535])
    mask = torch.zeros(1, 65536, dtype=torch.bool)
    mask[0, columns] = True
    grad, x = torch.tensor([[2.0], [3.0]]), torch.randn(2, 65536)
    result = kernels.sampled_matmul(grad, x, columns_of(mask), row_pointers(mask))
    torch.testing.assert_close(result, (grad.T @ x)[0, columns])


def test_sampled_matmul_long_row() -> None:
    check_sampled_matmul("cpu", (2, 1, 3000), torch.float32)


def test_sampled_matmul_layouts_agree() -> None:
    grad, x, mask = torch.randn(5, 7), torch.randn(5, 40), random_mask(7, 40, 0.4)
    structure = columns_of(mask), row_pointers(mask)
    contiguous = kernels.sampled_matmul(grad, x, *structure)
    for name, view in views_of(x).items():
        assert torch.equal(kernels.sampled_matmul(grad, view, *structure), contiguous), name
    for name, view in views_of(grad).items():
        assert torch.equal(kernels.sampled_matmul(view, x, *structure), contiguous), name


def test_sampled_matmul_nan_stays_in_its_column() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    mask = torch.ones(2, 4, dtype=torch.bool)
    result = kernels.sampled_matmul(torch.ones(3, 2), x, columns_of(mask), row_pointers(mask))
    assert result.isnan().tolist() == [False, False, True, False] * 2


def test_why_not_allows_cpu_tensors() -> None:
    assert why_not("cpu", torch.float32) is None
