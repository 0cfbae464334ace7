"""Sizes where 32 bits end, and memory that must not grow with N x N."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sapwood import ops

N = 70_000  # N * N output positions are more than 2^32
COPIES = [(0, N - 1), (1, N // 2), (N // 2 + 1, N - 3), (N - 4, N - 2)]


@pytest.fixture(scope="module")
def many_rows() -> Tensor:
    """Random rows, far from each other but for the planted copies."""
    x = torch.randn(N, 24, generator=torch.Generator().manual_seed(0))
    for row, copy in COPIES:
        x[copy] = 2 * x[row]
    return x


def test_pairs_of_70_000_rows(many_rows: Tensor) -> None:
    pairs = ops.similarity_pairs(many_rows, threshold=0.99)
    assert list(zip(pairs.row.tolist(), pairs.col.tolist(), strict=True)) == COPIES
    torch.testing.assert_close(pairs.value, torch.ones(len(COPIES)))


def test_the_last_of_70_000_rows(many_rows: Tensor) -> None:
    last = many_rows[N - 4 :]
    values, indices = ops.similarity_topk(last, 2, many_rows)
    wanted = [[N - 4, N - 2], [N // 2 + 1, N - 3], [N - 4, N - 2], [0, N - 1]]
    assert indices.tolist() == wanted
    torch.testing.assert_close(values, torch.ones(4, 2))
    pairs = ops.similarity_pairs(many_rows[-1:], many_rows, threshold=0.99)
    assert pairs.col.tolist() == [0, N - 1]


def test_clusters_of_70_000_rows(many_rows: Tensor) -> None:
    labels = ops.similarity_clusters(many_rows, threshold=0.99)
    assert int(labels.max()) + 1 == N - len(COPIES)
    assert all(labels[row] == labels[copy] for row, copy in COPIES)


@pytest.mark.parametrize("name", ["row_normalize", "similarity_pairs", "similarity_topk"])
def test_more_rows_than_indices_hold_are_refused(name: str) -> None:
    """A stride-0 view: refused before anything of its size is made."""
    x = torch.ones(1, 4).expand(2**31, 4)
    arguments = {
        "row_normalize": ("cosine",),
        "similarity_pairs": (None, 0.5, "cosine", False, False, -1, True),
        "similarity_topk": (None, 1, "cosine", False, False, True),
    }
    with pytest.raises(RuntimeError, match=f"{name}: x must have fewer than 2\\^31 rows"):
        getattr(torch.ops.sapwood, name)(x, *arguments[name])


CAPPED = """
import resource
import torch
from pathlib import Path
from sapwood import ops

def address_space():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmSize:")) * 1024

n = 20_000
x, y = torch.randn(n, 64), torch.randn(n, 48)
ops.linear_cka(x[:3000], y[:3000])  # threads and libraries exist
limit = address_space() + 64 * 2**20  # the N x N matrix has 1.6 GB, the centred copies 9 MB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for debiased in (False, True):
    value = float(ops.linear_cka(x, y, debiased=debiased))
    assert abs(value) < 0.01, value
try:
    x @ x.T
except RuntimeError:
    print("the cap holds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is capped by the system")
def test_linear_cka_under_a_cap_on_memory() -> None:
    """N x N is never allocated: the child has no room for it, as the product at the end shows."""
    result = subprocess.run(
        (sys.executable, "-c", CAPPED), check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the cap holds\n"
