"""The similarity family: samples of every op, and the battery over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops
from sapwood.reference import similarity as reference
from tests.check_op import (
    FLOATS,
    HALVES,
    DifferentiableBattery,
    OpBattery,
    Sample,
    TraceableBattery,
    cast,
    outputs,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)

KINDS = reference.KINDS


def rows(n: int, k: int, seed: int = 0) -> Tensor:
    """Random rows with what is special: copies, multiples, opposites and zeros."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(1000 * n + k + seed))
    if n > 8:
        x[5], x[6], x[7] = x[3], 0.0, -2 * x[1]
        x[-1] = 0.5 * x[0]
    return x


SHAPES = [(19, 12), (0, 5), (1, 3), (2, 2), (70, 33), (300, 5), (15, 130)]


def samples(make: Callable[..., tuple[Any, ...]]) -> list[Sample]:
    """Every kind at the first shape, cosine at the others; with y and without."""
    found = []
    for at, (n, k) in enumerate(SHAPES):
        for kind in KINDS if at == 0 else ("cosine",):
            for y in (None, rows(n // 2 + 3, k, 1)):
                tags = frozenset({"main"} if (at, kind, y is None) == (0, "cosine", False) else ())
                name = f"{n}x{k}-{kind}-{'self' if y is None else 'two'}"
                found.append(Sample(name, make(rows(n, k), y, kind), tags=tags))
    return found


class TestRowNormalize(DifferentiableBattery):
    name = "row_normalize"
    vmappable = (0,)
    samples = (
        Sample("4x5", (torch.randn(4, 5), "cosine"), (0,), frozenset({"main"})),
        Sample("3x4", (torch.randn(3, 4), "correlation"), (0,)),
        Sample("2x7", (torch.randn(2, 7), "correlation"), (0,)),
        Sample("5x2", (torch.randn(5, 2), "cosine"), (0,)),
        Sample("1x3", (torch.randn(1, 3), "cosine"), (0,)),
        *(
            Sample(f"{n}x{k}-{kind}", (rows(n, k), kind))
            for n, k in SHAPES
            for kind in reference.UNIT_KINDS
        ),
        Sample("3x0", (torch.randn(3, 0), "cosine")),
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(4, int(args[0].shape[1]))

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Entries of a row of norm 1.

        A mean is rounded to eps of the largest entry, which the division by the norm of what is
        left enlarges. All types but float64 are summed in a wider one, where that does not show.
        """
        x, kind = args
        ones = torch.ones_like(x)
        if kind != "correlation" or self.precision != torch.float64 or not x.numel():
            return (ones,)
        spread = (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        enlarged = x.shape[-1] ** 0.5 * x.abs().amax(-1, keepdim=True) / spread
        varies = (x != x[..., :1]).any(-1, keepdim=True)
        return (torch.where(varies & (enlarged > 1), enlarged, 1.0).expand_as(x),)


def exact_matrix(args: tuple[Any, ...], kind: str) -> Tensor:
    x, y = args[0].double(), (args[0] if args[1] is None else args[1]).double()
    return reference.similarity_matrix(x, y, kind, False)


class SelectionBattery(OpBattery):
    """Forward results are judged against the exact matrix: what is chosen, and its values."""

    kind_at: int

    @pytest.mark.smoke
    @pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
    def test_forward(self, sample: Sample, dtype: torch.dtype) -> None:
        args = cast(sample.args, dtype)
        s = exact_matrix(args, args[self.kind_at])
        largest = max(1.0, float(s.abs().max())) if s.numel() else 1.0
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.judge(args, outputs(self.op(*args)), s, wide, largest)

    def judge(
        self,
        args: tuple[Any, ...],
        found: tuple[Tensor, ...],
        s: Tensor,  # (N, M) float64
        dtype: torch.dtype,
        largest: float,
    ) -> None:
        raise NotImplementedError

    @staticmethod
    def assert_values(values: Tensor, exact: Tensor, dtype: torch.dtype, largest: float) -> None:
        assert values.dtype == dtype
        error = (values.double() - exact).abs()
        bound = 4 * torch.finfo(dtype).eps * 16 * largest
        assert not error.numel() or float(error.max()) <= bound


class TestSimilarityPairs(SelectionBattery):
    name = "similarity_pairs"
    kind_at = 3
    samples = (
        *samples(
            lambda x, y, kind: (
                x,
                y,
                -5.0 if kind == "euclidean" else 0.3,
                kind,
                False,
                False,
                -1,
                True,
            )
        ),
        Sample("absolute", (rows(40, 9), None, 0.5, "cosine", True, False, -1, True)),
        Sample("with-self", (rows(40, 9), None, 0.5, "cosine", False, True, -1, True)),
        Sample("truncated", (rows(40, 9), None, 0.2, "cosine", False, False, 7, True)),
        Sample("no-recheck", (rows(40, 9), None, 0.21, "cosine", False, False, -1, False)),
    )

    def judge(
        self,
        args: tuple[Any, ...],
        found: tuple[Tensor, ...],
        s: Tensor,
        dtype: torch.dtype,
        largest: float,
    ) -> None:
        row, col, value, truncated = found
        _, y, threshold, _, absolute, include_self, max_pairs, _ = args
        key = s.abs() if absolute else s
        reaches, doubtful = key >= threshold, (key - threshold).abs() <= 1e-12 * largest
        if y is None:
            reaches = reaches.triu(0 if include_self else 1)
        wanted = (reaches & ~doubtful).nonzero()
        got = torch.stack([row, col], 1)
        clear = got[~doubtful[row, col]]
        if max_pairs >= 0:
            assert bool(truncated) == (len(wanted) > max_pairs)
            wanted = wanted[:max_pairs]
        else:
            assert not bool(truncated)
        assert torch.equal(clear, wanted)
        assert torch.equal(got, got[torch.argsort(got[:, 0] * (s.shape[1] + 1) + got[:, 1])])
        self.assert_values(value, s[row, col], dtype, largest)


class TestSimilarityTopk(SelectionBattery, TraceableBattery):
    name = "similarity_topk"
    kind_at = 3
    vmappable = (0, 1)
    samples = (
        *samples(lambda x, y, kind: (x, y, 4, kind, False, False, True)),
        Sample("absolute", (rows(40, 9), None, 5, "cosine", True, False, True)),
        Sample("with-self", (rows(40, 9), None, 1, "cosine", False, True, True)),
        Sample("more-than-there-are", (rows(5, 9), rows(3, 9), 7, "dot", False, False, True)),
        Sample("no-recheck", (rows(40, 9), None, 3, "cosine", False, False, False)),
        *(
            Sample(f"k={k}", (rows(200, 6), None, k, "cosine", False, False, True))
            for k in (32, 33, 100, 200)
        ),
    )

    def judge(
        self,
        args: tuple[Any, ...],
        found: tuple[Tensor, ...],
        s: Tensor,
        dtype: torch.dtype,
        largest: float,
    ) -> None:
        values, indices = found
        double: tuple[Any, ...] = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
        wanted, wanted_indices = reference.similarity_topk(*double)
        assert torch.equal(indices < 0, wanted_indices < 0)
        present = indices >= 0
        if not s.numel() or not len(indices):
            return
        chosen = s.gather(1, indices.clamp_min(0))
        keys = (chosen.abs(), wanted.abs()) if args[4] else (chosen, wanted)
        difference = (keys[0] - keys[1]).abs()[present]
        assert not difference.numel() or float(difference.max()) <= 1e-12 * largest
        assert all(len(set(r.tolist())) == len(r) for r in (i[i >= 0] for i in indices))
        self.assert_values(values[present], chosen[present], dtype, largest)
        assert bool((values[~present] == -torch.inf).all())


class TestSimilarityClusters(TraceableBattery):
    name = "similarity_clusters"
    exact = True
    samples = (
        Sample("main", (rows(19, 12), 0.4, "cosine", False), tags=frozenset({"main"})),
        *(
            Sample(f"{n}x{k}-{t}", (rows(n, k), t, "correlation" if k > 2 else "cosine", False))
            for n, k in SHAPES
            for t in (0.6, 0.95)
        ),
        Sample("absolute", (rows(60, 5), 0.9, "cosine", True)),
        Sample("euclidean", (rows(60, 5), -3.0, "euclidean", False)),
    )
