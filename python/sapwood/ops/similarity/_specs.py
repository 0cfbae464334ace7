"""Declarations of the family's ops: fakes, derivatives and vmap rules. N queries, M candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import similarity as reference

FAMILY = "similarity"


# row_normalize ------------------------------------------------------------------------------------


def _fake_row_normalize(x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_row_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x, output)


def _backward_row_normalize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    """dx = (g - u (u . g)) / |x|, centred again for correlation; 0 where a row has no direction."""
    if not ctx.needs_input_grad[0]:
        return None, None
    x, unit = ctx.saved_tensors
    rows = torch.where(unit.detach().ne(0).any(-1, keepdim=True), x, 0.0)
    peak = rows.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else rows.sum(-1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    scaled = rows / peak
    if ctx.kind == "correlation":
        scaled = scaled - scaled.mean(-1, keepdim=True)
        grad = grad - grad.mean(-1, keepdim=True)
    squares = (scaled * scaled).sum(-1, keepdim=True)
    some = squares > 0
    length = torch.where(some, squares, 1.0).sqrt()
    across = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return torch.where(some, across / length / peak, 0.0), None


def _vmap_row_normalize(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    x, kind = args
    folded = x.movedim(in_dims[0], 0).flatten(0, 1)
    return call(folded, kind).unflatten(0, (info.batch_size, -1)), 0


row_normalize = define_op(
    OpSpec(
        "row_normalize",
        FAMILY,
        fake=_fake_row_normalize,
        reference=reference.row_normalize,
        vmap=_vmap_row_normalize,
        setup=_setup_row_normalize,
        backward=_backward_row_normalize,
    )
)


# similarity_pairs: how many pairs there are depends on the values -----------------------------------


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_similarity_pairs(
    x: Tensor, y: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count: Any = torch.library.get_ctx().new_dynamic_size()
    torch._check(count <= x.shape[0] * (x if y is None else y).shape[0])
    return (
        x.new_empty(count, dtype=torch.int64),
        x.new_empty(count, dtype=torch.int64),
        x.new_empty(count, dtype=_result_dtype(x)),
        x.new_empty((), dtype=torch.bool),
    )


def _no_vmap(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
    raise NotImplementedError(
        "sapwood.similarity_pairs: the members of a vmapped batch have different numbers of pairs; "
        "call it for each outside of vmap"
    )


def _setup_similarity_pairs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, y, _, ctx.kind = inputs[:4]
    row, col, _, truncated = output
    ctx.mark_non_differentiable(row, col, truncated)
    ctx.save_for_backward(x, y, row, col)


def _through_pairs(
    x: Tensor, y: Tensor | None, row: Tensor, col: Tensor, kind: str, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum(grad * value) at fixed pairs; gathers and sums by index, nothing N x M."""
    x, candidates = reference.widened(x), reference.widened(x if y is None else y)
    if kind in reference.UNIT_KINDS:
        unit_x = row_normalize(x, kind)
        unit_y = unit_x if y is None else row_normalize(candidates, kind)
    else:
        unit_x, unit_y = (
            torch.where(reference.finite_rows(t)[:, None], t, 0.0) for t in (x, candidates)
        )
    a, b = unit_x[row], unit_y[col]  # (E, K)
    weight = grad[:, None].to(a.dtype)
    if kind == "euclidean":
        finite_x, finite_y = reference.finite_rows(x), reference.finite_rows(candidates)
        apart = torch.where((finite_x[row] & finite_y[col])[:, None], a - b, 0.0)
        through_a, through_b = -2 * weight * apart, 2 * weight * apart
    else:
        through_a, through_b = weight * b, weight * a
    grad_x = _sum_rows(through_a, row, len(x))
    grad_y = _sum_rows(through_b, col, len(candidates))
    if kind in reference.UNIT_KINDS:
        grad_x = _through_normalize(x, unit_x, kind, grad_x)
        grad_y = _through_normalize(candidates, unit_y, kind, grad_y)
    elif kind == "dot":
        grad_x = torch.where(reference.finite_rows(x)[:, None], grad_x, 0.0)
        grad_y = torch.where(reference.finite_rows(candidates)[:, None], grad_y, 0.0)
    if y is None:
        return grad_x + grad_y, None
    return grad_x, grad_y


class _Saved:
    """What the derivative of row_normalize reads of its context."""

    needs_input_grad = (True, False)

    def __init__(self, x: Tensor, unit: Tensor, kind: str) -> None:
        self.saved_tensors, self.kind = (x, unit), kind


def _through_normalize(x: Tensor, unit: Tensor, kind: str, grad: Tensor) -> Tensor:
    through, _ = _backward_row_normalize(_Saved(x, unit, kind), grad)
    assert through is not None
    return through


def _sum_rows(terms: Tensor, index: Tensor, count: int) -> Tensor:
    """out[i] = the sum of terms[e] with index[e] == i, in the order of e."""
    zeros = terms.new_zeros(count, terms.shape[1])
    if terms.device.type == "cpu":
        return zeros.index_add(0, index, terms)
    return zeros.index_put((index,), terms, accumulate=True)  # sorts: the order is fixed on GPUs too


def _backward_similarity_pairs(
    ctx: Any, grad_row: Any, grad_col: Any, grad: Tensor, grad_truncated: Any
) -> tuple[Tensor | None, ...]:
    x, y, row, col = ctx.saved_tensors
    grad_x, grad_y = _through_pairs(x, y, row, col, ctx.kind, grad)
    return _only_needed(ctx, x, y, grad_x, grad_y)


def _only_needed(
    ctx: Any, x: Tensor, y: Tensor | None, grad_x: Tensor | None, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Drops what no input asked for, and rounds to the inputs' types."""
    need_x, need_y = ctx.needs_input_grad[:2]
    rest = (None,) * (len(ctx.needs_input_grad) - 2)
    return (
        grad_x.to(x.dtype) if need_x and grad_x is not None else None,
        grad_y.to(x.dtype) if need_y and grad_y is not None else None,
        *rest,
    )


similarity_pairs = define_op(
    OpSpec(
        "similarity_pairs",
        FAMILY,
        fake=_fake_similarity_pairs,
        reference=reference.similarity_pairs,
        vmap=_no_vmap,
        setup=_setup_similarity_pairs,
        backward=_backward_similarity_pairs,
    )
)


# similarity_topk ----------------------------------------------------------------------------------


def _fake_similarity_topk(
    x: Tensor, y: Tensor | None, k: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], k, dtype=_result_dtype(x)),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    )


def _setup_similarity_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, y, _, ctx.kind = inputs[:4]
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, y, indices)


def _backward_similarity_topk(
    ctx: Any, grad: Tensor, grad_indices: Any
) -> tuple[Tensor | None, ...]:
    x, y, indices = ctx.saved_tensors
    n, k = indices.shape
    row = torch.arange(n, device=x.device)[:, None].expand(n, k).reshape(-1)
    col, flat = indices.reshape(-1), grad.reshape(-1)
    padding = col < 0
    if len(x if y is None else y) == 0:
        row, col, flat = row[:0], col[:0], flat[:0]
    else:
        col, flat = col.clamp_min(0), torch.where(padding, 0.0, flat)
    grad_x, grad_y = _through_pairs(x, y, row, col, ctx.kind, flat)
    return _only_needed(ctx, x, y, grad_x, grad_y)


similarity_topk = define_op(
    OpSpec(
        "similarity_topk",
        FAMILY,
        fake=_fake_similarity_topk,
        reference=reference.similarity_topk,
        vmap=loop_over_batch,
        setup=_setup_similarity_topk,
        backward=_backward_similarity_topk,
    )
)


# similarity_clusters ------------------------------------------------------------------------------


def _fake_similarity_clusters(x: Tensor, threshold: float, kind: str, absolute: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


similarity_clusters = define_op(
    OpSpec(
        "similarity_clusters",
        FAMILY,
        fake=_fake_similarity_clusters,
        reference=reference.similarity_clusters,
        vmap=loop_over_batch,
    )
)
