"""Arguments of the similarity family; special numbers are in ``test_similarity.py``."""

from __future__ import annotations

import torch
from torch import Tensor

import tests.test_similarity as batteries
from sapwood.reference import similarity as reference
from tests.properties.strategies import Arguments, Property, Source

_GAP = 1e-9  # wider than what float64 itself rounds


def _rows(s: Source, kind: str) -> tuple[Tensor, Tensor | None]:
    k = s.size(2 if kind == "correlation" else 0)
    return s.normal(s.size(), k), s.normal(s.size(), k) if s.flag() else None


def _normalized(s: Source) -> Arguments:
    kind = s.pick(reference.UNIT_KINDS)
    return s.normal(s.size(), s.size(2 if kind == "correlation" else 0)), kind


def _threshold(s: Source, similarities: Tensor) -> float:
    """Between two of the similarities, or beyond all of them."""
    known = similarities.flatten().sort().values
    if not len(known):
        return 0.5
    known = torch.cat([known[:1] - 1, known, known[-1:] + 1])
    wide = (known.diff() > _GAP).nonzero()[:, 0]
    at = int(wide[int(s.pick((0.0, 0.5, 0.9, 1.0)) * (len(wide) - 1))])
    return float(known[at : at + 2].mean())


def _pairs(s: Source) -> Arguments:
    kind, absolute = s.pick(reference.KINDS), s.flag()
    x, y = _rows(s, kind)
    matrix = reference.similarity_matrix(
        x.double(), (x if y is None else y).double(), kind, absolute
    )
    most = s.pick((-1, -1, 0, 7))
    return x, y, _threshold(s, matrix), kind, absolute, s.flag(), most, True


def _topk(s: Source) -> Arguments:
    kind = s.pick(reference.KINDS)
    return *_rows(s, kind), s.size(1), kind, s.flag(), s.flag(), True


def _clusters(s: Source) -> Arguments:
    kind, absolute = s.pick(reference.KINDS), s.flag()
    x, _ = _rows(s, kind)
    matrix = reference.similarity_matrix(x.double(), x.double(), kind, absolute)
    return x, _threshold(s, matrix), kind, absolute


def _same_clusters(args: Arguments) -> None:
    """Labels of the exact similarities; the threshold is away from all of them."""
    x, *rest = args
    labels = torch.ops.sapwood.similarity_clusters(x, *rest)
    assert torch.equal(labels, reference.similarity_clusters(x.double(), *rest))


PROPERTIES = {
    "row_normalize": Property(batteries.TestRowNormalize, _normalized),
    "similarity_pairs": Property(batteries.TestSimilarityPairs, _pairs),
    "similarity_topk": Property(batteries.TestSimilarityTopk, _topk),
    "similarity_clusters": Property(batteries.TestSimilarityClusters, _clusters, _same_clusters),
}
