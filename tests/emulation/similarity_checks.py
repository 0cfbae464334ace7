"""Checks of the device kernels of similarity, shared by the emulation and by real devices.

Every check takes the namespace of ops (``torch.ops.sapwood_emu`` or ``torch.ops.sapwood``) and rows
that lie where the ops run. Expected values are plain torch in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapwood.reference import similarity as reference

KINDS = reference.KINDS
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Shape = tuple[int, int, int]  # N, M (0: x with itself), K
SHAPES: list[Shape] = [
    (0, 0, 4),
    (1, 0, 3),
    (5, 0, 0),
    (64, 0, 7),
    (70, 0, 9),
    (3, 130, 17),
    (66, 65, 8),
    (4, -1, 5),  # no candidates
]


def problem(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Random rows with copies, multiples, opposites, zeros and rows that are not finite."""
    n, m, k = shape
    g = torch.Generator().manual_seed(n * 1000003 + m * 1009 + k)
    x, y = torch.randn(n, k, generator=g), torch.randn(max(m, 0), k, generator=g)
    if n > 8 and k > 0:
        x[5], x[6], x[7] = x[3], 0.0, -2 * x[1]
        x[8, k - 1], x[4, 0] = torch.nan, torch.inf
        x[-1] = 0.5 * x[0]
    if m > 8 and n > 0 and k > 0:
        y[2], y[-1] = x[0], -x[0]
    return x.to(device, dtype), None if m == 0 else y.to(device, dtype)


def exact(x: Tensor, y: Tensor | None, kind: str) -> Tensor:
    return reference.similarity_matrix(x.double(), (x if y is None else y).double(), kind, False)


def result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def assert_values(values: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert values.dtype == dtype
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(values), finite)
    assert torch.equal(values[~finite].double(), expected[~finite])
    error = (values.double() - expected).abs()[finite]
    largest = max(1.0, float(expected[finite].abs().max())) if error.numel() else 1.0
    assert not error.numel() or float(error.max()) <= 64 * torch.finfo(dtype).eps * largest


def check_row_normalize(ops: Any, x: Tensor, kind: str) -> None:
    got = ops.row_normalize(x, kind)
    wanted = reference.row_normalize(x.double(), kind)
    assert got.dtype == x.dtype
    bound = 16 * torch.finfo(x.dtype).eps
    assert not got.numel() or float((got.double() - wanted).abs().max()) <= bound


def check_pairs(
    ops: Any,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    threshold: float,
    *,
    absolute: bool = False,
    include_self: bool = False,
    max_pairs: int = -1,
) -> None:
    arguments = (threshold, kind, absolute, include_self, max_pairs, True)
    row, col, value, truncated = ops.similarity_pairs(x, y, *arguments)
    s = exact(x, y, kind)
    key = s.abs() if absolute else s
    finite = key[torch.isfinite(key)]
    slack = 1e-12 * max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    unsure = (key - threshold).abs() <= slack
    reaches = key >= threshold
    if y is None:
        reaches = reaches.triu(0 if include_self else 1)
    wanted = (reaches & ~unsure).nonzero()
    assert bool(truncated) == (0 <= max_pairs < len(wanted))
    if max_pairs >= 0:
        wanted = wanted[:max_pairs]
    got = torch.stack([row, col], 1)
    assert torch.equal(got[~unsure[row, col]], wanted)
    assert_values(value, s[row, col], result_dtype(x))


def check_topk(
    ops: Any, x: Tensor, y: Tensor | None, kind: str, k: int, *, absolute: bool = False
) -> None:
    values, indices = ops.similarity_topk(x, y, k, kind, absolute, False, True)
    wide = None if y is None else y.double()
    wanted, places = reference.similarity_topk(x.double(), wide, k, kind, absolute, False, True)
    assert torch.equal(indices < 0, places < 0)
    present = indices >= 0
    s = exact(x, y, kind)
    if not s.numel():
        assert not present.any()
        return
    chosen = s.gather(1, indices.clamp_min(0))[present]
    best = wanted[present]
    if absolute:
        assert torch.allclose(chosen.abs(), best.abs(), rtol=1e-12, atol=1e-12)
    else:
        assert torch.allclose(chosen, best, rtol=1e-12, atol=1e-12)
    assert_values(values[present], chosen, result_dtype(x))
    assert all(len(set(r[r >= 0].tolist())) == int((r >= 0).sum()) for r in indices)


def check_clusters(ops: Any, x: Tensor, kind: str, threshold: float) -> None:
    got = ops.similarity_clusters(x, threshold, kind, False)
    assert torch.equal(got, reference.similarity_clusters(x.double(), threshold, kind, False))
