"""Pairs and top-k of any shape, layout and number, against float64 arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sapwood import ops
from sapwood.reference import similarity as reference
from tests.properties.strategies import DTYPES, EXAMPLES, laid_out

pytestmark = pytest.mark.filterwarnings("ignore:sapwood.*rows hold NaN:RuntimeWarning")

SPECIAL = (0.0, -0.0, 1.0, 1e-40, 1e4, torch.inf, -torch.inf, torch.nan)
SCALES = (1e-30, 1e-4, 1.0, 3e4, 1e30)  # of all entries, for kinds that do not depend on it
LAYOUTS = ("contiguous", "sliced", "offset", "transposed")
BAND = 1e-12  # of the size of a pair: what float64 itself cannot tell


@dataclass(frozen=True)
class Case:
    """A drawn problem; y is None for x with itself."""

    x: Tensor
    y: Tensor | None
    kind: str
    absolute: bool
    include_self: bool
    layout: str

    def laid_out(self) -> tuple[Tensor, Tensor | None]:
        y = None if self.y is None else laid_out(self.y, self.layout)
        return laid_out(self.x, self.layout), y

    def exact(self) -> tuple[Tensor, Tensor]:
        """(N, M) similarities in float64, and how far they may be from the truth."""
        x, y = (t.double() for t in (self.x, self.x if self.y is None else self.y))
        s = reference.similarity_matrix(x, y, self.kind, False)
        if self.kind in reference.UNIT_KINDS:
            return s, torch.full_like(s, BAND)
        lengths = [torch.where(reference.finite_rows(t), t.norm(dim=1), 0.0) for t in (x, y)]
        if self.kind == "dot":
            return s, BAND * lengths[0][:, None] * lengths[1]
        return s, BAND * (lengths[0].square()[:, None] + lengths[1].square())


def numbers(n: int, k: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Random entries, one in twenty a special number; some rows repeat others."""
    x = (scale * torch.randn(n, k)).to(dtype)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (n, k))].to(dtype)
    x = torch.where(torch.rand(n, k) < 0.05, special, x)
    source = torch.arange(n)
    again = torch.rand(n) < 0.2
    source[again] = torch.randint(max(n, 1), (int(again.sum()),))
    return x[source]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(reference.KINDS))
    n, m = draw(st.integers(0, 65)), draw(st.none() | st.integers(0, 65))
    k = draw(st.integers(2 if kind == "correlation" else 0, 65))
    dtype = draw(st.sampled_from(DTYPES))
    wide = kind in reference.UNIT_KINDS and dtype != torch.float16
    scale = draw(st.sampled_from(SCALES if wide else (1.0,)))
    flags = draw(st.tuples(st.booleans(), st.booleans()))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = numbers(n, k, scale, dtype)
    y = None if m is None else numbers(m, k, scale, dtype)
    return Case(x, y, kind, *flags, draw(st.sampled_from(LAYOUTS)))


def between(known: Tensor, gap: float, share: float) -> float:
    """A threshold that float64 can tell from all these: below, above or between two of them."""
    if not known.numel():
        return 0.5
    values = known.sort().values
    values = torch.cat([values[:1] - 2 - 2 * gap, values, values[-1:] + 2 + 2 * gap])
    wide = (values.diff() > gap).nonzero()[:, 0]
    at = wide[round(share * (len(wide) - 1))]
    return float((values[at] + values[at + 1]) / 2)


def assert_values(value: Tensor, exact: Tensor, band: Tensor) -> None:
    """Products of rows, rounded; distances are taken around the mean of all rows."""
    if not value.numel():
        return
    size = float(band.max()) / BAND
    rounded = exact.to(value.dtype)
    near = (value - rounded).abs() <= 64 * torch.finfo(value.dtype).eps * size
    assert bool(((value == rounded) | near).all())


@EXAMPLES
@given(case=cases(), share=st.floats(0.0, 1.0))
def test_any_pairs(case: Case, share: float) -> None:
    s, band = case.exact()
    key = s.abs() if case.absolute else s
    threshold = between(key[key.isfinite()], 4 * float(band.max()) if band.numel() else 0.0, share)
    arguments: dict[str, Any] = {
        "threshold": threshold,
        "kind": case.kind,
        "absolute": case.absolute,
        "include_self": case.include_self,
    }
    x, y = case.laid_out()
    pairs = ops.similarity_pairs(x, y, **arguments)
    reaches = key >= threshold
    if case.y is None:
        reaches = reaches.triu(0 if case.include_self else 1)
    assert torch.equal(torch.stack([pairs.row, pairs.col], 1), reaches.nonzero())
    assert_values(pairs.value, s[pairs.row, pairs.col], band)
    plain = ops.similarity_pairs(case.x, case.y, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(pairs, plain, strict=True))


@EXAMPLES
@given(case=cases(), k=st.integers(1, 70))
def test_any_topk(case: Case, k: int) -> None:
    s, band = case.exact()
    key = s.abs() if case.absolute else s
    if case.y is None and not case.include_self:
        key = key.clone().fill_diagonal_(torch.nan)
    x, y = case.laid_out()
    flags: dict[str, Any] = {
        "kind": case.kind,
        "absolute": case.absolute,
        "include_self": case.include_self,
    }
    values, indices = ops.similarity_topk(x, k, y, **flags)
    largest = band.amax(1) if len(band.T) else band.sum(1)
    for i, row in enumerate(key):
        there = int((~row.isnan()).sum())
        found = indices[i, : min(k, there)]
        assert bool((indices[i, len(found) :] == -1).all())
        assert bool((values[i, len(found) :] == -torch.inf).all())
        assert len(set(found.tolist())) == len(found)
        wanted = row[~row.isnan()].sort(descending=True).values[: len(found)]
        chosen = row[found]
        near = (chosen == wanted) | ((chosen - wanted).abs() <= 2 * largest[i])
        assert bool(near.all()), "not the best, or not in order"
        assert_values(values[i, : len(found)], s[i, found], band)
    plain = ops.similarity_topk(case.x, k, case.y, **flags)
    assert all(torch.equal(a, b) for a, b in zip((values, indices), plain, strict=True))
