"""Log-sum-exp over segments of a dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.logsemiring import _sequence_specs, _triton
from sapwood.ops.logsemiring._matmul import floats
from sapwood.reference import logsemiring as reference

_SUM, _SOFTMAX, _MAX = "segment_logsumexp", "segment_softmax", "segment_max"
_BACKENDS: dict[str, tuple[_backend.Backend, ...]] = {
    _SUM: (
        _backend.native(_SUM, _sequence_specs.segment_logsumexp),
        _triton.backend(_SUM),
        _backend.Backend("reference", lambda *_: None, reference.segment_logsumexp),
    ),
    _SOFTMAX: (
        _backend.native(_SOFTMAX, _sequence_specs.segment_softmax),
        _triton.backend(_SOFTMAX),
        _backend.Backend("reference", lambda *_: None, reference.segment_softmax),
    ),
    _MAX: (
        _backend.native(_MAX, _sequence_specs.segment_max),
        _backend.Backend("reference", lambda *_: None, reference.segment_max),
    ),
}


class SegmentMax(NamedTuple):
    """What :func:`segment_max` returns.

    Example:
        >>> import torch
        >>> from sapwood.ops import segment_max
        >>> segment_max(torch.tensor([3.0, 5.0, 1.0]), torch.tensor([0, 0, 2])).indices
        tensor([ 1, -1,  2])

    Args:
        values: the largest entry of each segment, -inf for an empty one.
        indices: int64, which entry of the dimension it is; -1 where the value is -inf.
    """

    values: Tensor
    indices: Tensor


class SegmentPlan:
    """Which entry belongs to which segment: sorted and checked once, used often.

    Example::

        plan = sapwood.ops.SegmentPlan(torch.tensor([2, 0, 2]), num_segments=4)
        y = sapwood.ops.segment_logsumexp(torch.randn(3), plan=plan)   # (4,)

    Args:
        index: (n,) int64, the segment of each entry, in any order.
        num_segments: how many there are; default the largest index + 1.

    Raises:
        ValueError: for an index outside ``[0, num_segments)`` (waits for the device once).
        TypeError: if ``index`` is not an int64 tensor.
    """

    def __init__(self, index: Tensor, num_segments: int | None = None) -> None:
        op = "SegmentPlan"
        _check.tensor(op, "index", index)
        _check.dtype(op, "index", index, (torch.int64,))
        _check.dims(op, "index", index, 1)
        low, high = (int(v) for v in index.aminmax()) if len(index) else (0, -1)
        count = high + 1 if num_segments is None else num_segments
        if low < 0 or high >= count:
            actual = f"values from {low} to {high}"
            _check.fail(ValueError, op, "index", f"lie in [0, {count})", actual)
        in_order = bool((index[1:] >= index[:-1]).all())
        self.order: Tensor | None = None if in_order else index.argsort(stable=True)
        lengths = torch.bincount(index, minlength=count)
        self.ptr = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.entries = len(index)

    @classmethod
    def from_ptr(cls, ptr: Tensor) -> SegmentPlan:
        """A plan for entries in order: segment s holds entries ptr[s] to ptr[s + 1] - 1."""
        op = "SegmentPlan"
        _check.tensor(op, "ptr", ptr)
        _check.dtype(op, "ptr", ptr, (torch.int64,))
        _check.dims(op, "ptr", ptr, 1)
        if len(ptr) == 0 or int(ptr[0]) != 0 or bool((ptr.diff() < 0).any()):
            shown = ptr.tolist() if len(ptr) <= 8 else f"{len(ptr)} numbers that do not"
            _check.fail(ValueError, op, "ptr", "start at 0 and not decrease", shown)
        plan = cls.__new__(cls)
        plan.ptr, plan.order, plan.entries = ptr, None, int(ptr[-1])
        return plan

    @property
    def num_segments(self) -> int:
        return len(self.ptr) - 1

    def to(self, device: torch.device | str) -> SegmentPlan:
        """The plan on another device."""
        plan = SegmentPlan.__new__(SegmentPlan)
        plan.ptr = self.ptr.to(device)
        plan.order = None if self.order is None else self.order.to(device)
        plan.entries = self.entries
        return plan


def _plan(
    op: str,
    index: Tensor | None,
    ptr: Tensor | None,
    plan: SegmentPlan | None,
    num_segments: int | None,
) -> SegmentPlan:
    if plan is not None and index is None and ptr is None and num_segments is None:
        return plan
    given = [n for n, v in (("index", index), ("ptr", ptr), ("plan", plan)) if v is not None]
    if len(given) != 1:
        actual = " and ".join(given) or "none of them"
        _check.fail(ValueError, op, "exactly one of index, ptr and plan", "be given", actual)
    if index is not None:
        return SegmentPlan(index, num_segments)
    found = plan if plan is not None else SegmentPlan.from_ptr(ptr)  # type: ignore[arg-type]
    if num_segments is not None and num_segments != found.num_segments:
        want = f"be {found.num_segments}, as the segments given"
        _check.fail(ValueError, op, "num_segments", want, num_segments)
    return found


class _Division(NamedTuple):
    """x with the divided dimension in the middle, and how to undo that."""

    flat: Tensor  # (O, n, I)
    plan: SegmentPlan
    before: torch.Size
    after: torch.Size

    def run(self, op: str) -> Any:
        chosen = _backend.choose(op, _BACKENDS[op], self.flat)
        return chosen.run(self.flat, self.plan.ptr, self.plan.order)

    def restore(self, y: Tensor) -> Tensor:  # (O, S, I)
        return y.reshape(*self.before, self.plan.num_segments, *self.after)


def _divide(
    op: str,
    x: Tensor,
    index: Tensor | None,
    ptr: Tensor | None,
    plan: SegmentPlan | None,
    num_segments: int | None,
    dim: int,
) -> _Division:
    """Checked arguments of an op over segments."""
    (x,) = floats(op, x=x)
    if not -x.dim() <= dim < x.dim():
        _check.fail(ValueError, op, "dim", f"be in [{-x.dim()}, {x.dim() - 1}]", dim)
    dim %= x.dim()
    found = _plan(op, index, ptr, plan, num_segments)
    entries = found.entries
    if entries != x.shape[dim]:
        want = f"cover x.size({dim}) = {x.shape[dim]} entries"
        _check.fail(ValueError, op, "index" if index is not None else "ptr", want, entries)
    if x.device != found.ptr.device:
        _check.same_device(op, x=x, ptr=found.ptr, order=found.order)
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    return _Division(x.reshape(before.numel(), entries, after.numel()), found, before, after)


def _explainer(op: str) -> Any:
    def explain(x: Tensor, *_: Any, **__: Any) -> _backend.Explanation:
        return _backend.Explanation(op, _backend.candidates(_BACKENDS[op], x))

    return explain


@_backend.explainable(_explainer(_SUM))
def segment_logsumexp(
    x: Tensor,
    index: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    plan: SegmentPlan | None = None,
    num_segments: int | None = None,
    dim: int = -1,
) -> Tensor:
    """Log-sum-exp over the entries of each segment of a dimension.

    Example::

        x, index = torch.randn(5), torch.tensor([0, 2, 0, 2, 2])
        y = sapwood.ops.segment_logsumexp(x, index)   # (3,); segment 1 is empty: -inf

    Give exactly one of ``index``, ``ptr`` and ``plan``; a plan saves the sorting in later calls.

    Args:
        x: (*) floating point.
        index: (x.size(dim),) int64, the segment of each entry, in any order.
        ptr: (S + 1,) int64: segment s holds the entries ptr[s] to ptr[s + 1] - 1.
        plan: a :class:`SegmentPlan`.
        num_segments: S; default the largest index + 1.
        dim: the dimension that the segments divide.

    Returns:
        ``x`` with S in place of the size of ``dim``. An empty segment, or one of -inf only, is -inf
        with gradient 0; NaN is not hidden.

    Raises:
        ValueError: for none or several of the three, an index out of range, a ``ptr`` that
            decreases or does not end at the size of ``dim``.
        TypeError: for non-tensors and wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    division = _divide(_SUM, x, index, ptr, plan, num_segments, dim)
    return division.restore(division.run(_SUM))


@_backend.explainable(_explainer(_SOFTMAX))
def segment_softmax(
    x: Tensor,
    index: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    plan: SegmentPlan | None = None,
    num_segments: int | None = None,
    dim: int = -1,
) -> Tensor:
    """Softmax within each segment of a dimension: ``exp(x - segment_logsumexp(x))``.

    Example::

        scores, node = torch.randn(5), torch.tensor([0, 2, 0, 2, 2])
        attention = sapwood.ops.segment_softmax(scores, node)   # (5,), sums to one at every node

    Give exactly one of ``index``, ``ptr`` and ``plan``; a plan saves the sorting in later calls.

    Args:
        x: (*) floating point.
        index: (x.size(dim),) int64, the segment of each entry, in any order.
        ptr: (S + 1,) int64: segment s holds the entries ptr[s] to ptr[s + 1] - 1.
        plan: a :class:`SegmentPlan`.
        num_segments: S; default the largest index + 1.
        dim: the dimension that the segments divide.

    Returns:
        (*), as ``x``. A segment of -inf only gives zeros; +inf entries share their segment equally.

    Raises:
        ValueError: for none or several of the three, an index out of range, a ``ptr`` that
            decreases or does not end at the size of ``dim``.
        TypeError: for non-tensors and wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    division = _divide(_SOFTMAX, x, index, ptr, plan, num_segments, dim)
    p: Tensor = division.run(_SOFTMAX)
    return p.reshape(x.shape)


@_backend.explainable(_explainer(_MAX))
def segment_max(
    x: Tensor,
    index: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    plan: SegmentPlan | None = None,
    num_segments: int | None = None,
    dim: int = -1,
) -> SegmentMax:
    """The largest entry of each segment of a dimension, and which entry that is.

    Example::

        x, index = torch.randn(5), torch.tensor([0, 2, 0, 2, 2])
        values, indices = sapwood.ops.segment_max(x, index)   # (3,); segment 1 is empty: -inf, -1

    Give exactly one of ``index``, ``ptr`` and ``plan``; a plan saves the sorting in later calls.

    Args:
        x: (*) floating point.
        index: (x.size(dim),) int64, the segment of each entry, in any order.
        ptr: (S + 1,) int64: segment s holds the entries ptr[s] to ptr[s + 1] - 1.
        plan: a :class:`SegmentPlan`.
        num_segments: S; default the largest index + 1.
        dim: the dimension that the segments divide.

    Returns:
        ``values`` and int64 ``indices``, both ``x`` with S in place of the size of ``dim``. The
        first entry among ties; NaN is larger than every number; -1 where the value is -inf. The
        gradient of a value goes to its entry.

    Raises:
        ValueError: for none or several of the three, an index out of range, a ``ptr`` that
            decreases or does not end at the size of ``dim``.
        TypeError: for non-tensors and wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    division = _divide(_MAX, x, index, ptr, plan, num_segments, dim)
    values, indices = division.run(_MAX)
    return SegmentMax(division.restore(values), division.restore(indices))
