"""similarity: rows that reach beyond 2^31 elements; more in ``tests/test_similarity_large.py``.

Tiles, keys and ranks of the device kernels are those of ``tests/cpp/test_similarity_offsets.cpp``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .memory import FAR, apart, last_blocks, last_of, on_linux, reserved

pytestmark = on_linux


@pytest.mark.parametrize("name", ["row_normalize", "similarity_clusters"])
def test_rows_far_apart(ops: Any, name: str) -> None:
    x = torch.randn(5, 6)
    x[3] = 2 * x[1]
    rest = ("cosine",) if name == "row_normalize" else (0.99, "cosine", False)
    op = getattr(ops, name)
    assert torch.equal(op(apart(x, 0), *rest), op(x, *rest))


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_row_normalize() -> None:
    rows, k = 2**15 + 1, 2**16
    x = reserved(rows, k)
    x[-2:] = torch.randn(2, k)
    unit = torch.ops.sapwood.row_normalize(x, "cosine")
    torch.testing.assert_close(unit[-2:], torch.nn.functional.normalize(x[-2:]))
    assert not unit[-3].any()


def test_normalizing_the_last_rows(emulated: Any) -> None:
    rows, k, of_block = 2**20 + 1, 2**11, 4
    near = torch.randn(1, k)
    with last_blocks():
        unit = emulated.row_normalize(last_of(near, rows), "cosine")
    torch.testing.assert_close(unit[-1:], torch.nn.functional.normalize(near))
    assert rows % of_block == 1


def test_clusters_of_the_last_rows(emulated: Any) -> None:
    """The last tile has four rows, those that the last block normalises."""
    rows, k = 2**21 + 4, 1024
    near = torch.randn(4, k)
    near[2] = 3 * near[0]
    assert rows * k > FAR  # in fewer tiles than a grid has blocks
    with last_blocks():
        labels = emulated.similarity_clusters(last_of(near, rows), 0.99, "cosine", False)
    assert (labels[-4:] - labels[-4]).tolist() == [0, 1, 0, 2]
