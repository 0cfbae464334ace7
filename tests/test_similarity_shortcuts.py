"""Ways to save products that must not show: bfloat16 proposals, and tiles out of reach."""

from __future__ import annotations

import pytest
import torch

from sapwood import ops
from sapwood.reference import similarity as reference
from tests.test_similarity import KINDS, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [7, 40])
def test_lower_precision_changes_no_result(kind: str, dtype: torch.dtype, k: int) -> None:
    x = rows(500, k).nan_to_num(0, 0, 0).clamp(-4, 4)
    x[250:300] = x[:50] + 1e-3 * torch.randn(50, k)
    x = x.to(dtype)
    for y in (None, x[:90].clone()):
        threshold = {"dot": 5.0, "euclidean": -9.0}.get(kind, 0.3)
        low, high = (
            (
                *ops.similarity_pairs(x, y, threshold=threshold, kind=kind, precision=precision),
                *ops.similarity_topk(x, 9, y, kind=kind, precision=precision),
            )
            for precision in ("bf16", "fp32")
        )
        for at in (0, 1, 3, 4):  # all but the values of pairs, which fp32 rounds
            assert torch.equal(low[at], high[at])
        torch.testing.assert_close(low[2], high[2], rtol=1e-5, atol=1e-5)


def test_few_long_rows_among_short_ones() -> None:
    """Panels out of reach are skipped under dot: norms fall over four decades."""
    x = torch.randn(900, 8, dtype=torch.float64) * torch.logspace(2, -2, 900)[:, None].double()
    for order in (torch.arange(900), torch.randperm(900)):
        s = x[order] @ x[order].T
        for absolute in (False, True):
            key = s.abs() if absolute else s
            row, col, _ = ops.similarity_pairs(
                x[order], threshold=50.0, kind="dot", absolute=absolute
            )
            assert torch.equal(torch.stack([row, col], 1), (key >= 50).triu(1).nonzero())
            _, found = ops.similarity_topk(x[order], 5, kind="dot", absolute=absolute)
            best = key.clone().fill_diagonal_(-torch.inf).topk(5).values
            torch.testing.assert_close(key.gather(1, found), best, rtol=1e-12, atol=0)
        got = ops.similarity_clusters(x[order], threshold=50.0, kind="dot")
        assert torch.equal(got, reference.similarity_clusters(x[order], 50.0, "dot", False))
