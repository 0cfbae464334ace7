"""The similarity family against its peers: what each provider runs stands here in full.

Rows x (N, K), every fourth one a noisy copy of another, cosine similarity. ``dense`` is the full
matrix in torch, normalised in the call, as a user would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood._measure import Call
from sapwood.cli.benchmarks.runner import FamilyCase, Unavailable, require_small_error
from sapwood.reference import similarity as reference

THRESHOLD, K = 0.9, 10

#: op of a case -> (baseline, providers)
PROVIDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "similarity_matrix": ("dense", ("dense", "sapwood", "cdist", "sklearn")),
    "similarity_pairs": ("dense", ("dense", "sapwood", "chunked", "sklearn", "faiss")),
    "similarity_topk": ("chunked", ("chunked", "sapwood", "dense", "sklearn", "faiss")),
    "similarity_clusters": ("dense", ("dense", "sapwood")),
}
#: Largest difference of a value from the one in float64.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}
CHUNK = 1024


@dataclass(frozen=True)
class SimilarityCase(FamilyCase):
    """One op at one size."""

    table: ClassVar = PROVIDERS

    n: int
    k: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}"

    def build(self, provider: str) -> Call:
        return _BUILDERS[self.op](problem_of(self), provider)

    def check(self, provider: str, result: object) -> None:
        error = _CHECKS[self.op](self, result)
        require_small_error(self, provider, error, TOLERANCE[self.dtype])


@lru_cache(maxsize=1)  # the providers of a case follow one another; a sweep must not pile up
def problem_of(case: SimilarityCase) -> Tensor:
    """The rows of a case, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.n, case.k, generator=generator)
    copies = case.n // 4
    x[case.n - copies :] = x[:copies] + 0.3 * torch.randn(copies, case.k, generator=generator)
    return x.to(case.device, getattr(torch, case.dtype))


def cases(*, quick: bool, device: str = "cpu", dtype: str = "float32") -> Iterator[SimilarityCase]:
    """The sweep: a few sizes in the quick one, up to 20 000 rows in the full one."""
    for n in (300, 1000):
        yield SimilarityCase("similarity_matrix", n, 256, dtype, device)
    for n in (2000,) if quick else (2000, 8000, 20_000):
        for op in ("similarity_pairs", "similarity_topk", "similarity_clusters"):
            yield SimilarityCase(op, n, 256, dtype, device)


def _full(x: Tensor) -> Tensor:
    unit = F.normalize(x)
    return unit @ unit.T


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    unit = F.normalize(x)
    for first in range(0, len(x), CHUNK):
        yield first, unit[first : first + CHUNK] @ unit.T


def _matrix(x: Tensor, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: sapwood.ops.similarity_matrix(x)
    if provider == "cdist":  # of normalised rows: cos = 1 - |a - b|^2 / 2

        def by_distance() -> Tensor:
            unit = F.normalize(x)
            return 1 - torch.cdist(unit, unit).square() / 2

        return by_distance
    if provider == "sklearn":
        pairwise, rows = _sklearn("metrics.pairwise"), _numpy(x)
        return lambda: pairwise.cosine_similarity(rows)
    return lambda: _full(x)


def _pairs(x: Tensor, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: tuple(sapwood.ops.similarity_pairs(x, threshold=THRESHOLD))
    if provider == "chunked":
        return lambda: _chunked_pairs(x)
    if provider == "sklearn":  # both (i, j) and (j, i), unsorted distances of normalised rows
        neighbors, rows = _sklearn("neighbors"), _numpy(F.normalize(x))
        radius = (2 - 2 * THRESHOLD) ** 0.5

        def by_radius() -> Any:
            index = neighbors.NearestNeighbors(radius=radius, algorithm="brute").fit(rows)
            return _upper(
                *_from_csr(index.radius_neighbors_graph(mode="distance")), by_distance=True
            )

        return by_radius
    if provider == "faiss":
        return lambda: _faiss_pairs(x)
    return lambda: _dense_pairs(x)


def _dense_pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = _full(x)
    row, col = (s >= THRESHOLD).triu_(1).nonzero(as_tuple=True)
    return row, col, s[row, col]


def _chunked_pairs(x: Tensor) -> tuple[Tensor, ...]:
    found = []
    for first, s in _chunks(x):
        row, col = (s >= THRESHOLD).triu_(first + 1).nonzero(as_tuple=True)
        found.append((row + first, col, s[row, col]))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def _faiss_pairs(x: Tensor) -> Any:
    faiss, rows = _faiss(), _numpy(F.normalize(x))
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    starts, values, col = index.range_search(rows, THRESHOLD)
    row = torch.arange(len(x)).repeat_interleave(torch.from_numpy(starts).long().diff())
    return _upper(row, torch.from_numpy(col), torch.from_numpy(values))


def _upper(row: Tensor, col: Tensor, value: Tensor, *, by_distance: bool = False) -> Any:
    kept = row < col
    row, col, value = row[kept], col[kept], value[kept]
    order = torch.argsort(row * (int(col.max()) + 1 if len(col) else 1) + col)
    value = 1 - value.square() / 2 if by_distance else value
    return row[order], col[order], value[order]


def _from_csr(csr: Any) -> tuple[Tensor, Tensor, Tensor]:
    coo = csr.tocoo()
    return (
        torch.from_numpy(coo.row).long(),
        torch.from_numpy(coo.col).long(),
        torch.from_numpy(coo.data),
    )


def _topk(x: Tensor, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: sapwood.ops.similarity_topk(x, K, include_self=True)
    if provider == "dense":
        return lambda: tuple(_full(x).topk(K))
    if provider == "sklearn":
        neighbors, rows = _sklearn("neighbors"), _numpy(x)

        def brute() -> Any:
            index = neighbors.NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine")
            distance, indices = index.fit(rows).kneighbors(rows)
            return torch.from_numpy(1 - distance), torch.from_numpy(indices)

        return brute
    if provider == "faiss":
        faiss, rows = _faiss(), _numpy(F.normalize(x))

        def flat() -> Any:
            index = faiss.IndexFlatIP(rows.shape[1])
            index.add(rows)
            values, indices = index.search(rows, K)
            return torch.from_numpy(values), torch.from_numpy(indices)

        return flat

    def chunked() -> tuple[Tensor, ...]:
        parts = [s.topk(K) for _, s in _chunks(x)]
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

    return chunked


def _clusters(x: Tensor, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: sapwood.ops.similarity_clusters(x, threshold=THRESHOLD)

    def components() -> Tensor:
        try:
            from scipy.sparse import coo_matrix
            from scipy.sparse.csgraph import connected_components
        except ImportError as error:
            raise Unavailable("scipy is not installed: pip install 'sapwood[bench]'") from error
        row, col, value = (_numpy(t) for t in _dense_pairs(x))
        graph = coo_matrix((value, (row, col)), shape=(len(x), len(x)))
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()

    return components


_BUILDERS: dict[str, Callable[[Tensor, str], Call]] = {
    "similarity_matrix": _matrix,
    "similarity_pairs": _pairs,
    "similarity_topk": _topk,
    "similarity_clusters": _clusters,
}


def _numpy(x: Tensor) -> Any:
    if x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16):
        raise Unavailable("takes float32 and float64 on the CPU")
    return x.numpy()


def _sklearn(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise Unavailable("scikit-learn is not installed: pip install scikit-learn") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise Unavailable("faiss is not installed: pip install faiss-cpu") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


# checks against float64 ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _exact(case: SimilarityCase) -> Tensor:
    x = problem_of(case).double()
    return reference.similarity_matrix(x, x, "cosine", False)


def _matrix_error(case: SimilarityCase, result: object) -> float:
    return float((torch.as_tensor(result).double() - _exact(case)).abs().max())


def _pairs_error(case: SimilarityCase, result: Any) -> float:
    """The worst value; a pair too many or too few counts by its distance to the threshold."""
    s, (row, col, value) = _exact(case), result
    got = torch.zeros_like(s, dtype=torch.bool)
    got[row, col] = True
    wrong = got != (s >= THRESHOLD).triu(1)
    misplaced = (s - THRESHOLD).abs()[wrong]
    values = (value.double() - s[row, col]).abs()
    return max((float(t.max()) for t in (misplaced, values) if len(t)), default=0.0)


def _topk_error(case: SimilarityCase, result: Any) -> float:
    s, (values, indices) = _exact(case), result
    best = s.topk(K).values
    chosen = (best - s.gather(1, indices)).abs().max()
    return float(torch.maximum(chosen, (values.double() - best).abs().max()))


def _clusters_error(case: SimilarityCase, result: Any) -> float:
    wanted = reference.similarity_clusters(problem_of(case).double(), THRESHOLD, "cosine", False)
    both = torch.unique(torch.stack([torch.as_tensor(result), wanted]), dim=1)
    count = int(wanted.max()) + 1
    return 0.0 if both.shape[1] == count == int(result.max()) + 1 else float("inf")


_CHECKS: dict[str, Callable[[SimilarityCase, Any], float]] = {
    "similarity_matrix": _matrix_error,
    "similarity_pairs": _pairs_error,
    "similarity_topk": _topk_error,
    "similarity_clusters": _clusters_error,
}
