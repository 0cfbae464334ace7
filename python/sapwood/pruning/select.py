"""Exact selection of the weights to switch off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sapwood.pruning import _radix
from sapwood.pruning._names import shape_of
from sapwood.pruning.allocation import LayerPlan, apportion, planned_zeros, require_sparsity
from sapwood.pruning.masks import MaskSet

__all__ = ["select"]

_WHERE = "sapwood.pruning.select"
SCOPES = ("global", "layer", "erk")


def select(
    scores: Mapping[str, Tensor],
    masks: MaskSet,
    sparsity: float,
    *,
    scope: str | LayerPlan = "global",
    monotone: bool = True,
    min_keep_per_layer: int = 1,
) -> MaskSet:
    """Switches off the elements with the lowest scores, exactly as many as asked for.

    With n elements, ``round_half_even(sparsity * n)`` are off in the result, in every run and on
    every device: equal scores are ranked by the order of the tensors and the flat index, the
    earlier one goes first.

    Example:
        >>> import torch
        >>> from sapwood.pruning import MaskSet, select
        >>> masks = MaskSet({"w": torch.ones(4, dtype=torch.bool)})
        >>> select({"w": torch.tensor([3.0, 1.0, 2.0, 1.0])}, masks, 0.5)["w"]
        tensor([ True, False,  True, False])

    Args:
        scores: name -> floating tensor of the mask's shape; high means keep.
        masks: the present masks; they give names, order and what is off already.
        sparsity: share of all elements to be off afterwards, in [0, 1).
        scope: ``"global"`` ranks all tensors together; ``"layer"`` gives every tensor the same
            sparsity; ``"erk"`` the Erdős-Rényi-kernel ones; a ``LayerPlan`` its proportions.
        monotone: what is off stays off and counts; if more is off than asked for, nothing changes.
        min_keep_per_layer: elements every tensor keeps (or all that are still on, if fewer); what
            this saves is taken from the other elements, so that the total stays exact.

    Returns:
        New masks on the devices of the scores.

    Raises:
        ValueError: if names or shapes differ, a score is NaN, the sparsity is not finite, outside
            [0, 1) or unreachable, or the scope is unknown.
        TypeError: if a score is no floating tensor.
    """
    sparsity = require_sparsity(sparsity, _WHERE)
    _validate(scores, masks, scope, min_keep_per_layer)
    layers = [_layer(name, scores[name], masks[name], monotone) for name in masks]
    sizes = [layer.scores.numel() for layer in layers]
    inactive = [layer.inactive() for layer in layers]
    off = round(sparsity * sum(sizes))
    if off <= sum(inactive):
        off, scope = sum(inactive), "global"  # the present masks, by the order of the keys
    bounds = [
        size - min(min_keep_per_layer, size - gone)
        for size, gone in zip(sizes, inactive, strict=True)
    ]
    if scope == "global":
        _require_reachable(off, bounds, sizes, sparsity)
        flat = _global(layers, off, bounds)
    else:
        shapes = {name: masks[name].shape for name in masks}
        ideal = planned_zeros(scope, shapes, sparsity)
        caps = [c if i else g for c, i, g in zip(bounds, ideal, inactive, strict=True)]
        _require_reachable(off, caps, sizes, sparsity)
        counts = apportion(ideal, off, inactive, caps)
        flat = [_radix.smallest([layer], k)[0] for layer, k in zip(layers, counts, strict=True)]
    chosen = {name: keep.view(masks[name].shape) for name, keep in zip(masks, flat, strict=True)}
    return MaskSet(chosen, aliases=masks.aliases, metadata=masks.metadata)


def _global(layers: Sequence[_radix.Layer], off: int, bounds: Sequence[int]) -> list[Tensor]:
    """One threshold; a tensor that would lose more than its bound is settled by itself.

    Settling a tensor at its bound only raises what the others lose, so a settled one never comes
    back and the loop ends.
    """
    settled: dict[int, Tensor] = {}
    while True:
        open_layers = [i for i in range(len(layers)) if i not in settled]
        rest = off - sum(bounds[i] for i in settled)
        keeps = _radix.smallest([layers[i] for i in open_layers], rest)
        proposed = dict(zip(open_layers, keeps, strict=True))
        over = [i for i, k in proposed.items() if k.numel() - int(k.count_nonzero()) > bounds[i]]
        if not over:
            return [settled[i] if i in settled else proposed[i] for i in range(len(layers))]
        for i in over:
            settled[i] = _radix.smallest([layers[i]], bounds[i])[0]


def _layer(name: str, scores: Tensor, mask: Tensor, monotone: bool) -> _radix.Layer:
    flat = scores.detach().reshape(-1)
    active = None
    if monotone and not bool(mask.all()):
        active = mask.to(scores.device).reshape(-1)
    return _radix.Layer(name, flat, active)


def require_scope(scope: str | LayerPlan, where: str) -> None:
    """ValueError unless ``select`` knows the scope."""
    if not isinstance(scope, LayerPlan) and scope not in SCOPES:
        raise ValueError(f"{where}: scope must be one of {SCOPES} or a LayerPlan, got {scope!r}")


def require_min_keep(min_keep: int, where: str) -> None:
    """ValueError unless it is a count."""
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 0:
        raise ValueError(f"{where}: min_keep_per_layer must be at least 0, got {min_keep!r}")


def _validate(
    scores: Mapping[str, Tensor], masks: MaskSet, scope: str | LayerPlan, min_keep: int
) -> None:
    require_scope(scope, _WHERE)
    require_min_keep(min_keep, _WHERE)
    if set(scores) != set(masks):
        differing = ", ".join(repr(name) for name in sorted(set(scores) ^ set(masks))[:5])
        raise ValueError(f"{_WHERE}: scores must name the masks, got a difference in {differing}")
    for name, mask in masks.items():
        score = scores[name]
        if not isinstance(score, Tensor) or not score.is_floating_point():
            actual = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"{_WHERE}: score {name} must be a floating tensor, got {actual}")
        if score.shape != mask.shape:
            raise ValueError(
                f"{_WHERE}: score {name} must have the mask's shape {shape_of(mask)}, "
                f"got {shape_of(score)}"
            )
        count = _radix.nan_count(score.detach())
        if count:
            raise ValueError(f"{_WHERE}: score {name} must hold numbers, got {count} NaN values")


def _require_reachable(
    off: int, bounds: Sequence[int], sizes: Sequence[int], sparsity: float
) -> None:
    if off > sum(bounds):
        reachable = math.floor(1e6 * sum(bounds) / sum(sizes)) / 1e6
        raise ValueError(
            f"{_WHERE}: sparsity must be at most {reachable} with min_keep_per_layer and this "
            f"scope, got {sparsity}"
        )
