"""Matrix products in the log and in the max-plus semiring."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.logsemiring import _specs, _triton
from sapwood.reference import logsemiring as reference

_METHODS = ("auto", "exact")


class MaxMatmul(NamedTuple):
    """What :func:`max_matmul` returns.

    Example:
        >>> import torch
        >>> from sapwood.ops import max_matmul
        >>> best = max_matmul(torch.tensor([[0.0, 2.0]]), torch.tensor([[5.0], [4.0]]))
        >>> best.values, best.indices
        (tensor([[6.]]), tensor([[1]]))

    Args:
        values: (*, M, N), the largest ``a + b``.
        indices: (*, M, N) int64, where it lies along K.
    """

    values: Tensor
    indices: Tensor


def _backends(name: str) -> tuple[_backend.Backend, ...]:
    return (
        _backend.native(name, getattr(_specs, name)),
        _triton.backend(name),
        _backend.Backend("reference", lambda *_: None, getattr(reference, name)),
    )


_LOG, _MAX, _SAMPLE = (_backends(n) for n in ("log_matmul", "max_matmul", "sample_matmul"))


def floats(op: str, **tensors: Tensor) -> list[Tensor]:
    """Checked tensors in their common dtype; under autocast float32."""
    given = list(tensors.values())
    alike = True
    for name, value in tensors.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            _check.tensor(op, name, value)
            _check.floating(op, name, value)
        alike = alike and value.dtype == given[0].dtype and value.device == given[0].device
    autocast = torch.is_autocast_enabled(given[0].device.type)
    if alike and not autocast:  # most calls
        return given
    _check.same_device(op, **tensors)
    if autocast:
        given = [t if t.dtype == torch.float64 else t.float() for t in given]
    dtype = given[0].dtype
    for other in given[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return [t if t.dtype == dtype else t.to(dtype) for t in given]


class _Product(NamedTuple):
    """Operands with one batch dimension, and the shape of the result."""

    a: Tensor  # (B, M, K)
    b: Tensor  # (B, K, N)
    batch: tuple[int, ...]
    rows: tuple[int, ...]  # (M,) or (): a was a vector
    cols: tuple[int, ...]

    def restore(self, result: Tensor) -> Tensor:  # (..., B, M, N)
        if not self.batch and self.rows and self.cols:
            return result.squeeze(-3)
        shape = (*result.shape[:-3], *self.batch, *self.rows, *self.cols)
        return result if result.shape == shape else result.reshape(shape)


def _product(op: str, a: Tensor, b: Tensor) -> _Product:
    a, b = floats(op, a=a, b=b)
    if a.dim() == 2 == b.dim() and a.shape[1] == b.shape[0]:  # most calls
        return _Product(a.unsqueeze(0), b.unsqueeze(0), (), (a.shape[0],), (b.shape[1],))
    for name, value in (("a", a), ("b", b)):
        if value.dim() == 0:
            _check.fail(ValueError, op, name, "have at least 1 dimension", "shape ()")
    rows, cols = a.shape[-2:-1], b.shape[-1:] if b.dim() > 1 else ()
    a = a[None] if a.dim() == 1 else a
    b = b[:, None] if b.dim() == 1 else b
    k = a.shape[-1]
    if b.shape[-2] != k:
        _check.fail(ValueError, op, "b", f"have size(-2) == a.size(-1) == {k}", b.shape[-2])
    batch = tuple(a.shape[:-2])
    if b.shape[:-2] != batch:
        batch = _common_batch(op, a, b)
    flat = [
        t if t.dim() == 3 and t.shape[:-2] == batch
        else t.expand(*batch, *t.shape[-2:]).reshape(math.prod(batch), *t.shape[-2:])
        for t in (a, b)
    ]  # fmt: skip
    return _Product(flat[0], flat[1], batch, tuple(rows), tuple(cols))


def _common_batch(op: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    except RuntimeError:
        want = f"have a batch that broadcasts with a's {tuple(a.shape[:-2])}"
        _check.fail(ValueError, op, "b", want, tuple(b.shape[:-2]))


def _explain_log(a: Tensor, b: Tensor, *, method: str = "auto") -> _backend.Explanation:
    p = _product("log_matmul", a, b)
    candidates = _backend.candidates(_LOG, p.a, p.b, method == "exact")
    return _backend.Explanation("log_matmul", candidates)


@_backend.explainable(_explain_log)
def log_matmul(a: Tensor, b: Tensor, *, method: str = "auto") -> Tensor:
    """Matrix product in the log semiring: ``log sum_k exp(a[i, k] + b[k, j])``.

    Example::

        transition = torch.log_softmax(torch.randn(8, 8), -1)
        two_steps = sapwood.ops.log_matmul(transition, transition)   # (8, 8)

    Exact where the sum of exponentials underflows: rows of -inf give -inf, values are right at any
    scale of the logits, and no gradient is NaN unless an input is. The fast path is an ordinary
    matrix product of exponentials; a bound on what underflow can have cost says which of its
    results are right, and the others are computed term by term.

    Args:
        a: (..., M, K) or (K,) floating point, any strides.
        b: (..., K, N) or (K,); batch dimensions broadcast as in ``torch.matmul``.
        method: "auto", or "exact" to compute every output term by term.

    Returns:
        (..., M, N) without the dimensions that a vector operand does not have. bfloat16 and float16
        are computed in float32 and rounded once.

    Raises:
        ValueError: for shapes that do not match or an unknown ``method``.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.

    References:
        The maxima of rows and columns as shifts: Peharz et al., Einsum Networks, ICML 2020,
        arXiv 2004.06231, equation 4. The certificate is our own.
    """
    _check.one_of("log_matmul", "method", method, _METHODS)
    p = _product("log_matmul", a, b)
    exact = method == "exact"
    chosen = _backend.choose("log_matmul", _LOG, p.a, p.b, exact)
    return p.restore(chosen.run(p.a, p.b, exact))


def _explain_max(a: Tensor, b: Tensor) -> _backend.Explanation:
    p = _product("max_matmul", a, b)
    return _backend.Explanation("max_matmul", _backend.candidates(_MAX, p.a, p.b))


@_backend.explainable(_explain_max)
def max_matmul(a: Tensor, b: Tensor) -> MaxMatmul:
    """Matrix product in the max-plus semiring: ``max_k (a[i, k] + b[k, j])`` and where.

    Example::

        values, indices = sapwood.ops.max_matmul(torch.randn(4, 5), torch.randn(5, 6))   # (4, 6)

    Args:
        a: (..., M, K) or (K,) floating point, any strides.
        b: (..., K, N) or (K,); batch dimensions broadcast as in ``torch.matmul``.

    Returns:
        ``values`` (..., M, N) and ``indices`` of the same shape, int64: the lowest k among ties, -1
        where the value is -inf. The gradient of a value goes to the two entries that attain it.

    Raises:
        ValueError: for shapes that do not match.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.
    """
    p = _product("max_matmul", a, b)
    values, indices = _backend.choose("max_matmul", _MAX, p.a, p.b).run(p.a, p.b)
    return MaxMatmul(p.restore(values), p.restore(indices))


def _explain_sample(a: Tensor, b: Tensor, **_: Any) -> _backend.Explanation:
    p = _product("sample_matmul", a, b)
    return _backend.Explanation("sample_matmul", _backend.candidates(_SAMPLE, p.a, p.b, 1, 0))


@_backend.explainable(_explain_sample)
def sample_matmul(
    a: Tensor,
    b: Tensor,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws k with probability proportional to ``exp(a[i, k] + b[k, j])`` for every (i, j).

    Example::

        k = sapwood.ops.sample_matmul(torch.randn(4, 5), torch.randn(5, 6))   # (4, 6) int64

    The draws depend on the generator's state only, not on the number of threads.

    Args:
        a: (..., M, K) or (K,) floating point, any strides.
        b: (..., K, N) or (K,); batch dimensions broadcast as in ``torch.matmul``.
        num_samples: how many independent draws; None for one without a dimension of its own.
        generator: a CPU generator for the seed; default torch's.

    Returns:
        int64 (..., M, N), or (num_samples, ..., M, N); -1 where all terms are -inf. No gradient.

    Raises:
        ValueError: for shapes that do not match or a negative ``num_samples``.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.

    References:
        The Gumbel-max trick: Maddison et al., A* Sampling, NeurIPS 2014. Philox: Salmon et al.,
        Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    if num_samples is not None and num_samples < 0:
        _check.fail(ValueError, "sample_matmul", "num_samples", "be at least 0", num_samples)
    p = _product("sample_matmul", a, b)
    seed = int(torch.randint(2**62, (), generator=generator))
    count = 1 if num_samples is None else num_samples
    chosen = _backend.choose("sample_matmul", _SAMPLE, p.a, p.b, count, seed)
    drawn = p.restore(chosen.run(p.a.detach(), p.b.detach(), count, seed))
    return drawn[0] if num_samples is None else drawn
