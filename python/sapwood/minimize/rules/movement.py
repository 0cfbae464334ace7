"""Operations that only move entries: the moved atoms tell where every channel went."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from sapwood.minimize._facts import BY_POSITION, CONSTANT, Facts, compress, varying
from sapwood.minimize.rules._registry import Step, opaque, rule

MOVES = """
view.default _unsafe_view.default reshape.default permute.default transpose.int t.default
numpy_T.default unsqueeze.default squeeze.default squeeze.dim squeeze.dims expand.default
expand_as.default flatten.using_ints unflatten.int movedim.int movedim.intlist swapaxes.default
repeat.default tile.default repeat_interleave.self_int flip.default split.Tensor chunk.default
split.sizes split_with_sizes.default unbind.int select.int slice.Tensor narrow.default
broadcast_to.default expand_copy.default unfold.default view_as.default reshape_as.default
channel_shuffle.default native_channel_shuffle.default index_select.default roll.default
"""
#: Operations that pick fixed indices of an axis; on a channel axis the indices would be wrong.
_PICKING = "split split_with_sizes chunk unbind select slice narrow index_select roll unfold"
_SHUFFLES = ("channel_shuffle", "native_channel_shuffle")


@rule(*(f"aten.{name}" for name in MOVES.split()))
def move(step: Step) -> Any:
    """Runs the operation on the atoms of the tensor in place of its values."""
    source = step.analysis.labelled(step.facts()[0])
    fields = [f for f in source.fields if _movable(step, source, f)]
    kinds = moved(step, source, source.kind)
    after = [moved(step, source, field) for field in fields]
    if isinstance(step.value, Tensor):
        return _result(step, source, fields, step.value, kinds, after)
    return [
        _result(step, source, fields, value, kinds[i], [m[i] for m in after])
        for i, value in enumerate(step.value)
    ]


def moved(step: Step, source: Facts, what: Tensor) -> Any:
    """What the operation does to a tensor that is compressed as the source's kind is."""
    first = step.facts()[0]
    # As float64, which every operation accepts and which holds the numbers exactly.
    full = what.expand(source.shape).double().contiguous()
    result = step.rerun(lambda facts: full if facts is first else facts.value)
    return _pytree.tree_map(lambda t: compress(t.to(what.dtype)), result)


def _result(
    step: Step,
    source: Facts,
    before: list[Tensor],
    value: Tensor,
    kind: Tensor,
    fields: list[Tensor],
) -> Facts:
    after: list[Tensor] = []
    for old, new in zip(before, fields, strict=True):
        if len(varying(new)) > len(varying(old)):
            _tie(step, new)
        if not varying(new):
            step.analysis.atoms.pin(new, f"{step.place} picks one channel")
            continue
        after.append(new)
    if _merges_positions(source, before, value, after):
        # Every position has become a channel of its own: what depends on it is a constant again.
        kind = torch.where(kind == BY_POSITION, CONSTANT, kind).to(torch.uint8)
    tail = source.tail if _keeps_order(before, after) else None
    return Facts(value, kind, tuple(after), tail)


def _keeps_order(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether the channels stand on one axis, in the order in which they stood on one axis."""
    return (
        len(before) == len(after) == 1
        and len(varying(before[0])) == len(varying(after[0])) == 1
        and torch.equal(before[0].flatten(), after[0].flatten())
    )


def _movable(step: Step, source: Facts, field: Tensor) -> bool:
    """Whether channels may still be removed after the operation; else they are pinned."""
    bound = step.bound()
    if step.name in _SHUFFLES and 1 in varying(field):
        _unite_blocks(step, field, 1, source.shape[1] // bound["groups"])
    if step.name not in _PICKING.split():
        return True
    dim = next((bound[key] for key in ("dim", "dims", "dimension") if key in bound), 0)
    dims = [dim] if isinstance(dim, int) else list(dim)
    for axis in dims or range(source.ndim):
        axis %= source.ndim
        if axis not in varying(field) or _whole(step, source, axis):
            continue
        parts = step.value if isinstance(step.value, (list, tuple)) else ()
        sizes = {part.shape[axis] for part in parts if part.dim() == source.ndim}
        if step.name in ("split", "split_with_sizes", "chunk") and len(sizes) == 1:
            _unite_blocks(step, field, axis, sizes.pop())
        elif not _uniform_classes(step, field, axis):
            reason = f"{step.place} picks channels by fixed numbers"
            step.analysis.atoms.pin(field, reason)
            return False
    return True


def _whole(step: Step, source: Facts, axis: int) -> bool:
    """A slice that takes everything."""
    return (
        isinstance(step.value, Tensor)
        and step.value.shape == source.shape
        and (step.name in ("slice", "narrow"))
    )


def _unite_blocks(step: Step, field: Tensor, axis: int, size: int) -> None:
    blocks = field.split(size, axis)
    for block in blocks[1:]:
        step.analysis.atoms.unite(blocks[0], block)


def _uniform_classes(step: Step, field: Tensor, axis: int) -> bool:
    """Whether all indices of the axis live and die together, so that it never shrinks."""
    roots = step.analysis.atoms.roots(field)
    return bool((roots == roots.narrow(axis, 0, 1)).all())


def _tie(step: Step, field: Tensor) -> None:
    """One axis of channels became several: removal must stay a box, so all but one are tied."""
    axes = varying(field)
    for axis in axes[:-1]:
        step.analysis.atoms.unite(field, field.narrow(axis, 0, 1))


def _merges_positions(
    source: Facts, before: list[Tensor], value: Tensor, after: list[Tensor]
) -> bool:
    if len(before) != 1 or len(after) != 1 or value.dim() != 2 or value.shape[0] != source.shape[0]:
        return False
    old, new = varying(before[0]), varying(after[0])
    return old == [1] and new == [1] and value.shape[1] > source.shape[1] and source.ndim > 2


@rule("aten.cat.default", "aten.concat.default", "aten.concatenate.default", "aten.stack.default")
def concatenate(step: Step) -> Facts:
    """Fields along the axis are put side by side; fields along other axes are united."""
    bound = step.bound()
    parts = [step.analysis.labelled(part) for part in bound["tensors"]]
    if step.name == "stack":
        parts = [_unsqueezed(part, bound["dim"] % step.value.dim()) for part in parts]
    parts = [part for part in parts if part.ndim == step.value.dim()]
    axis = bound["dim"] % step.value.dim()
    kind = _joined([part.kind for part in parts], parts, axis)
    fields = _across(step, parts, axis)
    along = _along(step, parts, axis)
    return Facts(step.value, compress(kind), (*fields, *along))


def _unsqueezed(part: Facts, axis: int) -> Facts:
    fields = tuple(field.unsqueeze(axis) for field in part.fields)
    return Facts(part.value.unsqueeze(axis), part.kind.unsqueeze(axis), fields)


def _joined(tensors: list[Tensor], parts: list[Facts], axis: int) -> Tensor:
    """Puts compressed tensors side by side, each as long as its part along the axis."""
    others = list(tensors[0].shape)
    for t in tensors:
        others = [max(a, b) for a, b in zip(others, t.shape, strict=True)]
    spread = []
    for t, part in zip(tensors, parts, strict=True):
        shape = list(others)
        shape[axis] = part.shape[axis]
        spread.append(t.expand(shape))
    return torch.cat(spread, axis)


def _across(step: Step, parts: list[Facts], axis: int) -> list[Tensor]:
    """Fields that do not run along the axis: the same channels in every part."""
    atoms = step.analysis.atoms
    fields: list[Tensor] = []
    for field in (f for f in parts[0].fields if axis not in varying(f)):
        matches = [[f for f in p.fields if varying(f) == varying(field)] for p in parts[1:]]
        if all(len(match) == 1 for match in matches):
            for (match,) in matches:
                atoms.unite(field, match)
            fields.append(field)
    for part in parts:
        for field in (f for f in part.fields if axis not in varying(f)):
            if not any(varying(f) == varying(field) for f in fields):
                atoms.pin(field, f"{step.place} joins channels with an axis that has none")
    return fields


def _along(step: Step, parts: list[Facts], axis: int) -> list[Tensor]:
    """Fields along the axis, one after the other."""
    atoms = step.analysis.atoms
    views = [part.on_axis(axis) for part in parts]
    for field in (field for _, mixed, _ in views for field in mixed):
        atoms.pin(field, f"{step.place} joins channels that are spread over several axes")
    if all(vector is None for vector, _, _ in views):
        return []
    pieces: list[Tensor] = []
    for part, (vector, _, _) in zip(parts, views, strict=True):
        if vector is None:
            vector = atoms.new(part.shape[axis], step.node.name)
            atoms.pin(vector, f"{step.place} joins channels with an axis that has none")
        pieces.append(vector)
    shape = [1] * step.value.dim()
    shape[axis] = -1
    return [torch.cat(pieces).reshape(shape)]


@rule(
    "aten.pad.default",
    "aten.constant_pad_nd.default",
    "aten.reflection_pad2d.default",
    "aten.replication_pad2d.default",
    "aten.reflection_pad1d.default",
    "aten.replication_pad1d.default",
)
def pad(step: Step) -> Any:
    """Padding along positions; constants stay uniform unless the padding holds another number."""
    source = step.analysis.labelled(step.facts()[0])
    amounts = step.bound()["pad" if step.name in ("pad", "constant_pad_nd") else "padding"]
    axes = sorted({source.ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount})
    if any(axis in varying(field) for field in source.fields for axis in axes):
        return opaque(step, f"{step.place} pads an axis of channels")
    kind = source.kind.amax(axes, keepdim=True) if axes else source.kind
    return Facts(step.value, compress(kind), source.fields)


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(step: Step) -> Any:
    """The r * r channels that become one live and die together."""
    source = step.facts()[0]
    vector, mixed, rest = source.on_axis(1 if source.ndim == 4 else 0)
    if source.ndim != 4 or vector is None or mixed or rest:
        return opaque(step)
    factor = step.bound()["upscale_factor"]
    blocks = vector.reshape(-1, factor * factor)
    step.analysis.atoms.unite(blocks, blocks[:, :1])
    kinds = source.kind.amax((2, 3)).expand(source.kind.shape[0], len(vector))
    kind = kinds.reshape(-1, len(blocks), factor * factor).amax(2)
    field = blocks[:, 0].reshape(1, -1, 1, 1)
    fields = (field,) if len(blocks) > 1 else ()
    if not fields:
        step.analysis.atoms.pin(vector, f"{step.place} makes one channel")
    return Facts(step.value, compress(kind[:, :, None, None]), fields)
