"""Declarations of the family's ops: fakes, derivatives and vmap rules. N queries, M candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import similarity as reference

FAMILY = "similarity"


# row_normalize ----------------------------------------------------------------------------------


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


# similarity_pairs: how many pairs there are depends on the values ---------------------------------


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


similarity_pairs = define_op(
    OpSpec(
        "similarity_pairs",
        FAMILY,
        fake=_fake_similarity_pairs,
        reference=reference.similarity_pairs,
        vmap=_no_vmap,
    )
)


# similarity_topk --------------------------------------------------------------------------------


def _fake_similarity_topk(x: Tensor, y: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], k, dtype=_result_dtype(x)),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    )


similarity_topk = define_op(
    OpSpec(
        "similarity_topk",
        FAMILY,
        fake=_fake_similarity_topk,
        reference=reference.similarity_topk,
        vmap=loop_over_batch,
    )
)


# similarity_clusters ----------------------------------------------------------------------------


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
