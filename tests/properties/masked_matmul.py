"""Arguments of the masked_matmul family."""

from __future__ import annotations

from torch import Tensor

import tests.test_masked_matmul as batteries
from sapwood.ops.masked_matmul import ACTIVATIONS
from sapwood.reference import masked_matmul as reference
from tests.properties.strategies import Arguments, Property, Source, laid_out


def _sizes(s: Source) -> tuple[int, int, int]:
    """Batch, inputs and outputs."""
    return s.size(), s.size(), s.size()


def _bias(s: Source, n: int) -> Tensor | None:
    return s.normal(n) if s.flag() else None


def _masked(s: Source) -> Arguments:
    b, k, n = _sizes(s)
    return s.normal(b, k), s.normal(n, k), s.mask(n, k), _bias(s, n), s.flag()


def _backward(s: Source) -> Arguments:
    b, k, n = _sizes(s)
    tensors = s.normal(b, n), s.normal(b, k), s.normal(n, k), s.mask(n, k)
    return *tensors, s.flag(), s.flag(), s.flag()


def _dense(s: Source) -> Arguments:
    _, k, n = _sizes(s)
    return s.normal(n, k), s.mask(n, k)


def _packed(s: Source, fmt: str) -> tuple[int, int, tuple[Tensor, ...]]:
    """Outputs, inputs and a packed weight; its values lie anywhere, its indices are contiguous."""
    weight, mask = _dense(s)
    values, *indices = batteries.structure({"weight": weight, "mask": mask}, fmt)
    return (
        len(weight),
        weight.shape[1],
        (laid_out(values, s.pick(("contiguous", "offset"))), *indices),
    )


def _transposed(s: Source) -> Arguments:
    _, k, (_, cols, row_ptr, _) = _packed(s, "csr")
    return cols, row_ptr, k


def _csr(s: Source) -> Arguments:
    n, k, packed = _packed(s, "csr")
    other = reference.transpose_csr(packed[1], packed[2], k) if s.flag() else (None,) * 4
    return s.normal(s.size(), k), *packed, _bias(s, n), k, s.pick(ACTIVATIONS), *other


def _bitmap(s: Source) -> Arguments:
    n, k, packed = _packed(s, "bitmap")
    return s.normal(s.size(), k), *packed, _bias(s, n), k, s.pick(ACTIVATIONS)


def _sell(s: Source) -> Arguments:
    n, k, packed = _packed(s, "sell")
    return s.normal(s.size(), k), *packed, _bias(s, n), n, k, s.pick(ACTIVATIONS)


def _sampled(s: Source) -> Arguments:
    n, k, packed = _packed(s, "csr")
    b = s.size()
    return s.normal(b, n), s.normal(b, k), *packed[1:3]


PROPERTIES = {
    "masked_matmul": Property(batteries.TestMaskedMatmul, _masked),
    "masked_matmul_backward": Property(batteries.TestMaskedMatmulBackward, _backward),
    "pack_csr": Property(batteries.TestPackCsr, _dense),
    "pack_bitmap": Property(batteries.TestPackBitmap, _dense),
    "pack_sell": Property(batteries.TestPackSell, _dense),
    "transpose_csr": Property(batteries.TestTransposeCsr, _transposed),
    "packed_linear_csr": Property(batteries.TestPackedLinearCsr, _csr),
    "packed_linear_bitmap": Property(batteries.TestPackedLinearBitmap, _bitmap),
    "packed_linear_sell": Property(batteries.TestPackedLinearSell, _sell),
    "sampled_matmul": Property(batteries.TestSampledMatmul, _sampled),
}
