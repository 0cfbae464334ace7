"""What the public functions of the family promise beside the maths."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

import sapwood
from sapwood import ops
from sapwood.reference import similarity as reference
from tests.test_similarity import KINDS, rows

UNIT = reference.UNIT_KINDS


# the matrix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_matrix_against_the_reference(kind: str, dtype: torch.dtype, bound: float) -> None:
    x, y = rows(40, 12).to(dtype), rows(25, 12, 1).to(dtype)
    for other in (x, y):
        wanted = reference.similarity_matrix(x.double(), other.double(), kind, False)
        got = ops.similarity_matrix(x, None if other is x else other, kind=kind)
        assert got.dtype == dtype
        assert float((got.double() - wanted).abs().max()) <= bound * max(
            1, float(wanted.abs().max())
        )
    magnitudes = ops.similarity_matrix(x, y, kind=kind, absolute=True)
    assert torch.equal(magnitudes, ops.similarity_matrix(x, y, kind=kind).abs())


def test_matrix_against_torch() -> None:
    x, y = torch.randn(30, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    cosine = F.cosine_similarity(x[:, None], y[None], dim=-1)
    torch.testing.assert_close(ops.similarity_matrix(x, y), cosine)
    torch.testing.assert_close(ops.similarity_matrix(x, kind="correlation"), torch.corrcoef(x))
    torch.testing.assert_close(
        ops.similarity_matrix(x, y, kind="euclidean"), -(torch.cdist(x, y) ** 2)
    )
    torch.testing.assert_close(ops.similarity_matrix(x, y, kind="dot"), x @ y.mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_gives_float32(dtype: torch.dtype) -> None:
    x = rows(20, 12).to(dtype)
    torch.testing.assert_close(ops.similarity_matrix(x), ops.similarity_matrix(x.float()))
    assert ops.similarity_pairs(x, threshold=0.1).value.dtype == torch.float32


def test_autocast_does_not_lower_the_precision() -> None:
    x, y = torch.randn(9, 40), torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        low = [*every_value(x), ops.linear_cka(x, y), ops.kernel_cka(x, y)]
    full = [*every_value(x), ops.linear_cka(x, y), ops.kernel_cka(x, y)]
    for a, b in zip(low, full, strict=True):
        assert torch.equal(a, b)


def every_value(x: Tensor) -> tuple[Tensor, ...]:
    return (
        ops.similarity_matrix(x),
        ops.similarity_matrix(x, kind="euclidean"),
        ops.similarity_pairs(x, threshold=0.0).value,
        ops.similarity_topk(x, 3)[0],
    )


@pytest.mark.parametrize("n", [159, 160, 161, 320, 500])
@pytest.mark.parametrize("kind", UNIT)
def test_matrix_of_one_input_is_symmetric(n: int, kind: str) -> None:
    x = rows(n, 20)
    s = ops.similarity_matrix(x, kind=kind)
    wanted = reference.similarity_matrix(x.double(), x.double(), kind, False)
    torch.testing.assert_close(s.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(ops.similarity_matrix(x, x, kind=kind), s, rtol=0, atol=1e-6)
    assert torch.equal(s, s.T) or n <= 160 * torch.get_num_threads()
    with_gradient = ops.similarity_matrix(x.requires_grad_(), kind=kind)
    torch.testing.assert_close(with_gradient, s, rtol=0, atol=1e-6)


def test_matrix_of_batches() -> None:
    x, y = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 4, 5)
    s = ops.similarity_matrix(x, y, kind="correlation")
    assert s.shape == (2, 3, 7, 4)
    torch.testing.assert_close(s[1, 2], ops.similarity_matrix(x[1, 2], y[1, 2], kind="correlation"))


# conventions --------------------------------------------------------------------------------------


def special(dtype: torch.dtype) -> Tensor:
    """Zeros, a constant row, NaN, inf, and the same direction at very different norms."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)
    x[0], x[1] = 0.0, 3.7
    x[2, 1], x[3, 2], x[4, 0] = torch.nan, torch.inf, -torch.inf
    x[6], x[7] = 1e30 * x[5], 1e-30 * x[5]
    return x


@pytest.mark.filterwarnings("ignore:sapwood")
@pytest.mark.parametrize("kind", UNIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_special_rows(kind: str, dtype: torch.dtype) -> None:
    x = special(dtype)
    s = ops.similarity_matrix(x, kind=kind)
    without = [0, 2, 3, 4] + ([1] if kind == "correlation" else [])
    assert not s[without].any()
    assert not s[:, without].any()
    torch.testing.assert_close(s[5:8, 5:8], torch.ones(3, 3, dtype=dtype))
    pairs = ops.similarity_pairs(x, threshold=0.999999, kind=kind)
    assert {(5, 6), (5, 7), (6, 7)} <= set(zip(pairs.row.tolist(), pairs.col.tolist(), strict=True))
    everything = ops.similarity_pairs(x, threshold=0.0, kind=kind, absolute=True, include_self=True)
    assert len(everything) == 12 * 13 // 2
    values, _ = ops.similarity_topk(x, 3, kind=kind)
    assert not values[without].any()


def test_correlation_of_entries_that_hardly_differ() -> None:
    """What float64 rounds in the mean is enlarged by |x| / |x - mean|, and by no more."""
    for gap in (1e-2, 1e-5, 1e-8):
        x = torch.tensor([[1.0, 1.0 + gap], [3.0, 3.0 - gap]], dtype=torch.float64)
        found = torch.ops.sapwood.row_normalize(x, "correlation")
        exact = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
        enlarged = 2**0.5 * x.abs().amax(1, keepdim=True) / (gap / 2**0.5)
        assert bool(((found - exact).abs() <= 2 * torch.finfo(x.dtype).eps * enlarged).all())


@pytest.mark.filterwarnings("ignore:sapwood")
def test_rows_that_are_not_finite_are_infinitely_far() -> None:
    x = special(torch.float64)
    s = ops.similarity_matrix(x, kind="euclidean")
    assert bool((s[2:5] == -torch.inf).all())
    assert bool((s[:, 2:5] == -torch.inf).all())
    assert torch.isfinite(s[[0, 1, 5]][:, [0, 1, 5, 7]]).all()
    assert bool((s.diagonal()[[0, 1, 5, 6, 7]] == 0).all())
    pairs = ops.similarity_pairs(x[:6], threshold=-1e300, kind="euclidean")
    assert set(pairs.row.tolist()) | set(pairs.col.tolist()) == {0, 1, 5}


def test_one_warning_says_how_many_rows_are_not_finite() -> None:
    x = special(torch.float32)
    with pytest.warns(RuntimeWarning, match="3 rows hold NaN or inf; their similarity to all rows"):
        ops.similarity_pairs(x, threshold=0.5)
    for kind, y in (("cosine", None), ("correlation", None), ("dot", None), ("cosine", x[5:])):
        with pytest.warns(RuntimeWarning, match="3 rows hold NaN or inf") as caught:
            ops.similarity_matrix(x, y, kind=kind)
        assert len(caught) == 1
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.similarity_pairs(x, threshold=0.5, check_finite=False)
        ops.similarity_topk(torch.full((3, 4), 3e38), 1)  # the sum overflows, the rows are finite


def test_near_duplicates_far_from_the_origin() -> None:
    """Trap: distances by expansion have no digits left here, the decision must have them all."""
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1000
    exact = reference.similarity_matrix(x.double(), x.double(), "euclidean", False)
    threshold = float(exact[torch.triu(torch.ones(50, 50), 1).bool()].median())
    pairs = ops.similarity_pairs(x, threshold=threshold, kind="euclidean")
    wanted = (exact >= threshold).triu(1).nonzero()
    assert torch.equal(torch.stack([pairs.row, pairs.col], 1), wanted)
    torch.testing.assert_close(pairs.value.double(), exact[pairs.row, pairs.col], rtol=1e-3, atol=0)


def test_thresholds_closer_to_one_than_float32_can_tell() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    x[300:] += 3e-4 * torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    s = reference.similarity_matrix(x.double(), x.double(), "cosine", False)
    threshold = float(s[torch.arange(300), torch.arange(300, 600)].median())
    assert 1 - threshold < 2e-7
    pairs = ops.similarity_pairs(x, threshold=threshold)
    assert torch.equal(torch.stack([pairs.row, pairs.col], 1), (s >= threshold).triu(1).nonzero())


# pairs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 1300])  # 1300: six strips, 41 panels
@pytest.mark.parametrize("k", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("absolute", [False, True], ids=["signed", "absolute"])
def test_pairs_at_awkward_sizes(n: int, k: int, absolute: bool) -> None:
    x = rows(n, k)
    s = reference.similarity_matrix(x.double(), x.double(), "cosine", False)
    key = s.abs() if absolute else s
    for threshold in (-1.0, 0.0, 0.5, 0.9, 1.0):
        row, col, value = ops.similarity_pairs(x, threshold=threshold, absolute=absolute)
        got = torch.zeros_like(s, dtype=torch.bool)
        got[row, col] = True
        assert len(row) == int(got.sum()), "a pair is reported twice"
        unsure = (key - threshold).abs() <= 1e-12
        assert not bool((((key >= threshold).triu(1) != got) & ~unsure.triu(1)).any())
        assert not len(value) or float((value.double() - s[row, col]).abs().max()) <= 2e-6


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_results_do_not_depend_on_threads(threads: None, kind: str) -> None:
    x = rows(3000, 24)  # worth several workers, many strips and panels
    threshold = 0.6 if kind == "cosine" else -20.0
    results = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        results.append(
            (
                *ops.similarity_pairs(x, threshold=threshold, kind=kind),
                *ops.similarity_topk(x, 10, kind=kind),
                *ops.similarity_topk(x[:500], 40, x, kind=kind),
                ops.similarity_clusters(x, threshold=threshold, kind=kind),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    s = reference.similarity_matrix(x[:300].double(), x.double(), kind, False)
    s[torch.arange(300), torch.arange(300)] = -torch.inf
    best, found = s.topk(10).values, s.gather(1, results[0][4][:300])
    assert float((best - found).abs().max()) <= 1e-12 * float(best.abs().max())


def test_max_pairs_keeps_the_first_ones() -> None:
    x = rows(600, 4)
    everything = ops.similarity_pairs(x, threshold=0.5)
    for most in (0, 1, 1000, len(everything) - 1):
        with pytest.warns(RuntimeWarning, match=f"more than max_pairs={most} pairs"):
            some = ops.similarity_pairs(x, threshold=0.5, max_pairs=most)
        assert some.truncated
        for a, b in zip(some, everything, strict=True):
            assert torch.equal(a, b[:most])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactly = ops.similarity_pairs(x, threshold=0.5, max_pairs=len(everything))
    assert not exactly.truncated
    assert len(exactly) == len(everything)
    with pytest.raises(RuntimeError, match="more than max_pairs=5 pairs reach the threshold"):
        ops.similarity_pairs(x, threshold=0.5, max_pairs=5, on_overflow="raise")


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("two", [False, True])
def test_overflow_extrapolates_the_number_of_pairs(two: bool, include_self: bool) -> None:
    """Where all pairs reach the threshold, the estimate is exact."""
    x = torch.rand(50, 3) + 0.1
    y = x[:37] if two else None
    total = 50 * 37 if two else 50 * 51 // 2 if include_self else 50 * 49 // 2
    for most in (1, 49, 50, 51, 777):
        about = {1850: "1,800", 1225: "1,200", 1275: "1,300"}[total]  # two digits
        with pytest.warns(RuntimeWarning, match=f"pairs reach the threshold, about {about} judged"):
            ops.similarity_pairs(x, y, threshold=0.0, include_self=include_self, max_pairs=most)


def test_pairs_as_csr() -> None:
    x = rows(40, 6)
    pairs = ops.similarity_pairs(x, threshold=0.3)
    s = ops.similarity_matrix(x)
    dense = torch.where((s >= 0.3).triu(1), s, 0.0)
    torch.testing.assert_close(pairs.to_csr().to_dense(), dense)


# clusters -----------------------------------------------------------------------------------------


def test_clusters_are_scipys_components() -> None:
    x = rows(700, 5)
    pairs = ops.similarity_pairs(x, threshold=0.97)
    ones = torch.ones(len(pairs)).numpy()
    graph = coo_matrix((ones, (pairs.row.numpy(), pairs.col.numpy())), shape=(700, 700))
    count, labels = connected_components(graph, directed=False)
    got = ops.similarity_clusters(x, threshold=0.97)
    assert count > 5
    first = torch.unique(torch.from_numpy(labels), return_inverse=True)[1]
    assert len(set(zip(got.tolist(), first.tolist(), strict=True))) == count
    assert int(got.max()) + 1 == count


def test_a_chain_across_tiles_is_one_cluster() -> None:
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    angle = order.double() * 1e-3  # neighbours differ by 1e-3, the ends by almost 1
    x = torch.stack([angle.cos(), angle.sin()], 1)
    assert not ops.similarity_clusters(x, threshold=0.9999994).any()
    assert int(ops.similarity_clusters(x, threshold=0.9999996).max()) == 899


# errors -------------------------------------------------------------------------------------------

X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: ops.similarity_pairs(X, torch.randn(4, 2), threshold=0.5),
            ValueError,
            "similarity_pairs: y must have a last dimension of 3 (x's columns), got shape (4, 2)",
        ),
        (
            lambda: ops.similarity_pairs(X, threshold=float("nan")),
            ValueError,
            "similarity_pairs: threshold must be a number, got nan",
        ),
        (
            lambda: ops.similarity_pairs(X, threshold=0.5, max_pairs=-2),
            ValueError,
            "similarity_pairs: max_pairs must be at least 0, got -2",
        ),
        (
            lambda: ops.similarity_pairs(X, threshold=0.5, on_overflow="stop"),
            ValueError,
            "similarity_pairs: on_overflow must be one of warn, raise, got 'stop'",
        ),
        (
            lambda: ops.similarity_pairs(X, threshold=0.5, precision="fp16"),
            ValueError,
            "similarity_pairs: precision must be one of fp32, bf16, got 'fp16'",
        ),
        (
            lambda: ops.similarity_topk(X, 1, precision="bf16", recheck=False),
            ValueError,
            "similarity_topk: precision must be fp32 without recheck, got 'bf16'",
        ),
        (
            lambda: ops.similarity_topk(X, 0),
            ValueError,
            "similarity_topk: k must be at least 1, got 0",
        ),
        (
            lambda: ops.similarity_topk(X[0], 1),
            ValueError,
            "similarity_topk: x must have 2 dimensions, got shape (3,)",
        ),
        (
            lambda: ops.similarity_clusters(X, threshold=0.5, kind="cos"),
            ValueError,
            "similarity_clusters: kind must be one of cosine, correlation, dot, euclidean, "
            "got 'cos'",
        ),
        (
            lambda: ops.similarity_matrix(X[:, :1], kind="correlation"),
            ValueError,
            "similarity_matrix: x must have at least 2 columns for correlation, got 1",
        ),
        (
            lambda: ops.similarity_matrix(X.long()),
            TypeError,
            "similarity_matrix: x must be floating point, got torch.int64",
        ),
        (
            lambda: ops.similarity_matrix(X, X.double()),
            TypeError,
            "similarity_matrix: y must have x's dtype torch.float32, got torch.float64",
        ),
        (
            lambda: ops.linear_cka(X, X[:3]),
            ValueError,
            "linear_cka: y must have x's 4 rows, got 3",
        ),
    ],
)
def test_errors(call: object, kind: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == f"sapwood.{message}"


def test_explain() -> None:
    assert sapwood.explain("similarity_pairs", X, threshold=0.5).chosen == "native"
    assert sapwood.explain(ops.similarity_matrix, X).chosen == "native"
    assert "reference" in str(sapwood.explain(ops.similarity_topk, X, 2))
    with sapwood.backend("reference"):
        explained = sapwood.explain(ops.similarity_clusters, X, threshold=0.5)
        labels = ops.similarity_clusters(X, threshold=0.5)
    assert explained.chosen == "reference"
    assert torch.equal(labels, ops.similarity_clusters(X, threshold=0.5))


@pytest.mark.parametrize("op", ["similarity_pairs", "similarity_topk", "similarity_clusters"])
def test_explain_says_what_triton_takes(op: str) -> None:
    arguments: dict[str, float] = {"k": 2} if op == "similarity_topk" else {"threshold": 0.5}
    explained = sapwood.explain(op, X, **arguments, kind="dot")
    reasons = {c.name: c.reason for c in explained.candidates}
    assert reasons["triton"] == "takes cosine and correlation, not dot"
