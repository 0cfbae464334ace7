"""Centred kernel alignment of two representations of the same N inputs.

Everything comes from few sums: for linear kernels from products in feature space (d x d, never
N x N while that is the larger), for other kernels from blocks of rows of the Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sapwood import _check
from sapwood.ops.similarity._checks import full_precision
from sapwood.reference.similarity import widened

_CHUNK = 2048  # rows whose centred copy stays small beside the representations
_BLOCK = 128  # columns of a symmetric product that are computed from the diagonal downwards
_MEDIAN_ROWS = 2048


def _checked(op: str, x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, t in (("x", x), ("y", y)):
        _check.tensor(op, name, t)
        _check.floating(op, name, t)
        _check.dims(op, name, t, 2)
    _check.same_dtype(op, "y", y, "x", x)
    _check.same_device(op, x=x, y=y)
    if len(x) != len(y):
        _check.fail(ValueError, op, "y", f"have x's {len(x)} rows", len(y))
    if len(x) < least:
        _check.fail(ValueError, op, "x", f"have at least {least} rows", len(x))
    wide = widened(x)
    return wide, wide if y is x else widened(y)


def _feature_terms(x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of (x, y), (x, x) and (y, y), all up to one common factor, from d x d products.

    The rows are centred in any case: it changes no HSIC, and keeps the sums from cancelling.
    """
    same = x is y
    sides = (x,) if same else (x, y)
    means = [t.mean(0) for t in sides]
    chunks = zip(*(t.split(_CHUNK) for t in sides), strict=True)
    pairs = ((0, 0),) if same else ((0, 1), (0, 0), (1, 1))
    grams: list[list[Tensor]] = [[] for _ in pairs]
    norms: list[list[Tensor]] = [[] for _ in sides]
    for chunk in chunks:
        rows = [t - m for t, m in zip(chunk, means, strict=True)]
        for i, (a, b) in enumerate(pairs):
            grams[i] = _add_products(grams[i], rows[a], rows[b])
        if debiased:
            for side, r in zip(norms, rows, strict=True):
                side.append(r.square().sum(1))
    terms = [_squared_norm(g, a == b) for g, (a, b) in zip(grams, pairs, strict=True)]
    if debiased:
        terms = [t + _correction(norms, p, len(x)) for t, p in zip(terms, pairs, strict=True)]
    return (terms[0],) * 3 if same else (terms[0], terms[1], terms[2])


def _add_products(blocks: list[Tensor], left: Tensor, right: Tensor) -> list[Tensor]:
    """Adds left^T right; where both are the same, by columns from the diagonal downwards only."""
    if left is not right:
        factors = [(left.mT, right)]
    else:
        width = left.shape[1]
        factors = [(left[:, at:].mT, left[:, at : at + _BLOCK]) for at in range(0, width, _BLOCK)]
    if not blocks:
        return [a @ b for a, b in factors]
    return [torch.addmm(g, a, b) for g, (a, b) in zip(blocks, factors, strict=True)]


def _squared_norm(blocks: Sequence[Tensor], symmetric: bool) -> Tensor:
    """Of the matrix that :func:`_add_products` built."""
    total = torch.stack([b.double().square().sum() for b in blocks]).sum()
    if not symmetric:
        return total
    squares = [b[: b.shape[1]].double().square().sum() for b in blocks]  # those on the diagonal
    return 2 * total - torch.stack(squares).sum()


def _correction(norms: Sequence[Sequence[Tensor]], pair: tuple[int, int], n: int) -> Tensor:
    """What takes |X^T Y|^2 to the unbiased HSIC (Song et al. 2012, eq. 5); rows sum to 0.

    With k_i = |x_i|^2: the diagonals add k.m to the trace; the other entries of a Gram matrix sum
    to -sum(k), those of its column j to -k_j.
    """
    k, m = (torch.cat(list(norms[side])).double() for side in pair)
    return k.sum() * m.sum() / ((n - 1) * (n - 2)) - (1 + 2 / (n - 2)) * (k @ m)


def _gram_terms(x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the Gram matrices, the smaller ones where there are few rows."""
    x, y = x - x.mean(0), y - y.mean(0)
    gram_x, gram_y = x @ x.mT, y @ y.mT
    return (
        _hsic_of_blocks([(gram_x, gram_y)], len(x), debiased),
        _hsic_of_blocks([(gram_x, gram_x)], len(x), debiased),
        _hsic_of_blocks([(gram_y, gram_y)], len(x), debiased),
    )


def _hsic_of_blocks(blocks: Sequence[tuple[Tensor, Tensor]], n: int, debiased: bool) -> Tensor:
    """HSIC up to its common factor, from blocks of rows of two Gram matrices."""
    trace = torch.zeros((), dtype=torch.float64, device=blocks[0][0].device)
    rows_k, rows_m = [], []
    first = 0
    for k, m in blocks:
        if debiased:
            off = torch.ones_like(k)
            off.diagonal(first).zero_()
            k, m = k * off, m * off
        trace = trace + (k * m).sum(dtype=torch.float64)
        rows_k.append(k.sum(1, dtype=torch.float64))
        rows_m.append(m.sum(1, dtype=torch.float64))
        first += len(k)
    return _from_sums(trace, torch.cat(rows_k), torch.cat(rows_m), n, debiased)


def _from_sums(trace: Tensor, k: Tensor, m: Tensor, n: int, debiased: bool) -> Tensor:
    """tr(K M) corrected by the row sums k and m of both matrices."""
    if debiased:  # zero diagonals; Song et al. 2012, eq. 5
        return trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m)
    return trace - 2 / n * (k @ m) + k.sum() * m.sum() / n**2


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor, dtype: torch.dtype) -> Tensor:
    return (xy / (xx.sqrt() * yy.sqrt())).to(dtype)


def _linear_terms(x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return _feature_terms(x, y, debiased)
    return _gram_terms(x, y, debiased)


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two representations, 1 where they differ by a rotation.

    Example::

        x, y = torch.randn(500, 64), torch.randn(500, 32)
        print(sapwood.ops.linear_cka(x, y, debiased=True))

    The N x N Gram matrices are formed only when they are smaller than the d1 x d2 product.

    Args:
        x: (N, d1) floating point, one row per input.
        y: (N, d2) of x's dtype, rows of the same inputs.
        debiased: use the unbiased estimate of HSIC. The biased one rises with d / N, also for
            representations that have nothing to do with each other. Needs N >= 4.

    Returns:
        A scalar tensor, float64 for float64 and else float32. Not finite input gives NaN, a
        representation without variance too.

    Raises:
        ValueError: for shapes that do not match or too few rows.
        TypeError: for non-tensors and other dtypes.
        RuntimeError: for tensors on different devices.

    References:
        Kornblith et al. 2019, arXiv:1905.00414, eq. 4; debiased: Song et al. 2012, eq. 5, as in
        Nguyen et al. 2021, arXiv:2010.15327, eq. 3.
    """
    x, y = _checked("linear_cka", x, y, 4 if debiased else 2)
    with full_precision(x):
        return _ratio(*_linear_terms(x, y, debiased), x.dtype)


def _bandwidth(x: Tensor) -> Tensor:
    """The median distance between at most 2048 rows, taken at equal steps."""
    step = -(-len(x) // _MEDIAN_ROWS)
    distances = torch.pdist(x.detach()[::step])
    return distances.median() if len(distances) else x.new_ones(())


def _squared_distances(rows: Tensor, x: Tensor) -> Tensor:
    """(B, N) squared distances; rows and x are centred already."""
    cross = rows @ x.mT
    squares = rows.square().sum(1)[:, None] + x.square().sum(1)
    return torch.relu(squares - 2 * cross)


def _rbf_block(rows: Tensor, x: Tensor, width: Tensor) -> Tensor:
    return torch.exp(-_squared_distances(rows, x) / (2 * width.square()))


def _rbf_sums(
    x: Tensor,
    y: Tensor,
    width_x: Tensor,
    width_y: Tensor,
    first: int,
    count: int,
    debiased: bool,
) -> tuple[Tensor, ...]:
    """The traces of K M, K K and M M and the row sums of K and M, over a block of rows."""
    k = _rbf_block(x[first : first + count], x, width_x)
    m = _rbf_block(y[first : first + count], y, width_y)
    if debiased:
        off = torch.ones_like(k)
        off.diagonal(first).zero_()
        k, m = k * off, m * off
    traces = ((a * b).sum(dtype=torch.float64) for a, b in ((k, m), (k, k), (m, m)))
    return (*traces, k.sum(1, dtype=torch.float64), m.sum(1, dtype=torch.float64))


def kernel_cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | str = "median",
    debiased: bool = True,
    batch: int | None = None,
) -> Tensor:
    """Centred kernel alignment with a Gaussian or a linear kernel; memory is batch x N.

    Example::

        x, y = torch.randn(500, 64), torch.randn(500, 32)
        print(sapwood.ops.kernel_cka(x, y))

    Args:
        x: (N, d1) floating point.
        y: (N, d2) of x's dtype.
        kernel: "rbf", ``exp(-|a - b|^2 / (2 w^2))``, or "linear".
        bandwidth: w, or "median": the median distance of at most 2048 rows, of x and y each.
        debiased: the unbiased estimate, see :func:`linear_cka`. Needs N >= 4.
        batch: rows of the Gram matrices at a time; by default about 64 MB of them.

    Returns:
        A scalar tensor, float64 for float64 and else float32. Differentiable, the bandwidth is not;
        the blocks are computed anew in the backward pass.

    Raises:
        ValueError: for shapes that do not match, too few rows, an unknown kernel or bandwidth.
        TypeError: for non-tensors and other dtypes.
        RuntimeError: for tensors on different devices.

    References:
        Kornblith et al. 2019, arXiv:1905.00414, section 3; Song et al. 2012, eq. 5.
    """
    op = "kernel_cka"
    _check.one_of(op, "kernel", kernel, ("rbf", "linear"))
    if isinstance(bandwidth, str):
        _check.one_of(op, "bandwidth", bandwidth, ("median",))
    elif not bandwidth > 0:
        _check.fail(ValueError, op, "bandwidth", "be positive", bandwidth)
    x, y = _checked(op, x, y, 4 if debiased else 2)
    with full_precision(x):
        if kernel == "linear":
            return _ratio(*_linear_terms(x, y, debiased), x.dtype)
        return _rbf_cka(x, y, bandwidth, debiased, batch)


def _rbf_cka(
    x: Tensor, y: Tensor, bandwidth: float | str, debiased: bool, batch: int | None
) -> Tensor:
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)
    widths = [
        _bandwidth(t) if isinstance(bandwidth, str) else t.new_tensor(bandwidth) for t in (x, y)
    ]
    size = batch or max(1, (64 << 20) // (n * 4 * x.element_size()))
    sums = []
    for at in range(0, n, size):
        count = min(size, n - at)
        if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
            block = checkpoint(_rbf_sums, x, y, *widths, at, count, debiased, use_reentrant=False)
        else:
            block = _rbf_sums(x, y, widths[0], widths[1], at, count, debiased)
        sums.append(block)
    xy, xx, yy = (torch.stack([s[i] for s in sums]).sum() for i in range(3))
    k, m = (torch.cat([s[i] for s in sums]) for i in (3, 4))
    return _ratio(
        _from_sums(xy, k, m, n, debiased),
        _from_sums(xx, k, k, n, debiased),
        _from_sums(yy, m, m, n, debiased),
        x.dtype,
    )


class CKAAccumulator:
    """Linear CKA between every layer of one model and every layer of another, from minibatches.

    Example::

        accumulator = sapwood.ops.CKAAccumulator(2)
        for batch in torch.randn(5, 100, 16):
            accumulator.update([batch, batch.relu()])
        print(accumulator.compute())  # (2, 2)

    The HSIC terms are summed over the batches and divided at the end. Debiased, their expectation
    does not depend on the size of the batches.

    Args:
        n_x: layers of the first model.
        n_y: layers of the second; None compares the first with itself.
        debiased: the unbiased estimate; every batch needs 4 rows.

    References:
        Nguyen et al. 2021, arXiv:2010.15327, eq. 2 and 3.
    """

    def __init__(self, n_x: int, n_y: int | None = None, *, debiased: bool = True) -> None:
        self.n_x, self.n_y, self.debiased = n_x, n_y, debiased
        columns = n_x if n_y is None else n_y
        self._cross = torch.zeros(n_x, columns, dtype=torch.float64)
        self._own_x = torch.zeros(n_x, dtype=torch.float64)
        self._own_y = torch.zeros(columns, dtype=torch.float64)

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None) -> None:
        """Adds one batch: a (B, d) representation per layer, of the same B inputs."""
        op = "CKAAccumulator.update"
        if (ys is None) != (self.n_y is None):
            wanted = "be absent" if self.n_y is None else f"hold {self.n_y} layers"
            _check.fail(ValueError, op, "ys", wanted, "none" if ys is None else len(ys))
        others = xs if ys is None else ys
        for name, given, wanted_count in (("xs", xs, self.n_x), ("ys", others, len(self._own_y))):
            if len(given) != wanted_count:
                _check.fail(ValueError, op, name, f"hold {wanted_count} layers", len(given))
        for i, x in enumerate(xs):
            for j, y in enumerate(others):
                if ys is None and j < i:
                    continue  # symmetric
                terms = _linear_terms(*_checked(op, x, y, 4 if self.debiased else 2), self.debiased)
                xy, xx, yy = (self._scaled(t, len(x)) for t in terms)
                self._cross[i, j] += xy
                if ys is None and j > i:
                    self._cross[j, i] += xy
                if j == (i if ys is None else 0):
                    self._own_x[i] += xx
                if i == (j if ys is None else 0):
                    self._own_y[j] += yy

    def _scaled(self, term: Tensor, n: int) -> Tensor:
        """The factor of HSIC that cancels within a batch, but not between batches."""
        return term.cpu() / (n * (n - 3) if self.debiased else (n - 1) ** 2)

    def compute(self) -> Tensor:
        """The alignments so far, (n_x, n_y) float64."""
        return self._cross / (self._own_x.sqrt()[:, None] * self._own_y.sqrt())

    def merge(self, other: CKAAccumulator) -> None:
        """Adds what another accumulator has seen."""
        mine, theirs = ((a.n_x, a.n_y, a.debiased) for a in (self, other))
        if mine != theirs:
            _check.fail(ValueError, "CKAAccumulator.merge", "other", f"be made as {mine}", theirs)
        for name, value in other.state_dict().items():
            getattr(self, f"_{name}").add_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, to be saved and given to :meth:`load_state_dict`."""
        return {"cross": self._cross, "own_x": self._own_x, "own_y": self._own_y}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces the sums by saved ones."""
        for name, mine in self.state_dict().items():
            _check.shape("CKAAccumulator.load_state_dict", name, state[name], tuple(mine.shape))
            mine.copy_(state[name])
