"""Exact selection of the weights to switch off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sapwood.pruning import _shards, structured
from sapwood.pruning._names import shape_of
from sapwood.pruning._pool import Pool
from sapwood.pruning.allocation import LayerPlan, apportion, planned_zeros, require_sparsity
from sapwood.pruning.masks import MaskSet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["select"]

_WHERE = "sapwood.pruning.select"
SCOPES = ("global", "layer", "erk")
GRANULARITIES = ("element", "n:m", "row")


def select(
    scores: Mapping[str, Tensor],
    masks: MaskSet,
    sparsity: float,
    *,
    scope: str | LayerPlan = "global",
    monotone: bool = True,
    absolute: bool = False,
    granularity: str = "element",
    n_m: tuple[int, int] | None = None,
    on_misfit: str = "raise",
    min_keep_per_layer: int = 1,
    min_keep_per_unit: int = 0,
    process_group: ProcessGroup | None = None,
) -> MaskSet:
    """Switches off the elements with the lowest scores, exactly as many as asked for.

    With n elements, ``round_half_even(sparsity * n)`` are off in the result, in every run and on
    every device: equal scores are ranked by the order of the tensors and the flat index, the
    earlier one goes first. The scores are neither sorted nor copied.

    Example:
        >>> import torch
        >>> from sapwood.pruning import MaskSet, select
        >>> masks = MaskSet({"w": torch.ones(4, dtype=torch.bool)})
        >>> select({"w": torch.tensor([3.0, 1.0, 2.0, 1.0])}, masks, 0.5)["w"]
        tensor([ True, False,  True, False])
        >>> weights = {"w": torch.tensor([[0.1, -4.0, 2.0, 0.3]])}
        >>> masks = MaskSet({"w": torch.ones(1, 4, dtype=torch.bool)})
        >>> select(weights, masks, 0.5, absolute=True, granularity="n:m", n_m=(2, 4))["w"]
        tensor([[False,  True,  True, False]])

    Args:
        scores: name -> floating tensor of the mask's shape; high means keep.
        masks: the present masks; they give names, order and what is off already.
        sparsity: share of all elements to be off afterwards, in [0, 1).
        scope: ``"global"`` ranks all tensors together; ``"layer"`` gives every tensor the same
            sparsity; ``"erk"`` the Erdős-Rényi-kernel ones; a ``LayerPlan`` its proportions.
        monotone: what is off stays off and counts; if more is off than asked for, nothing changes.
        absolute: rank by the absolute values of the scores, without a copy of them: with weights
            as scores this is magnitude pruning.
        granularity: ``"element"``; ``"n:m"``: the n best of every m inputs (our reading for
            convolutions: of every m input channels at each kernel position) stay, the sparsity
            must be 1 - n / m over the tensors that fit; ``"row"``: whole output rows go, those
            with the smallest L2 norm of their active scores first, as many as bring the number of
            switched-off elements nearest to the one asked for (fewer on a tie; under a scope other
            than ``"global"`` tensor by tensor, a rest is carried to the next tensor).
        n_m: (n, m) for granularity ``"n:m"``, 0 < n < m.
        on_misfit: what to do with tensors whose inputs do not divide by m: ``"raise"``, or
            ``"skip"``, which leaves them as they are and warns with their names.
        min_keep_per_layer: elements every tensor keeps (or all that are still on, if fewer); what
            this saves is taken from the other elements, so that the total stays exact.
        min_keep_per_unit: elements every output row keeps, in the same way; only with granularity
            ``"element"``.
        process_group: a group of the ranks of the scores' device mesh to communicate over, for
            instance one for tensors on the CPU; default: the mesh's own. Plain tensors are whole
            on every rank and need none.

    Sharded scores and masks, as of ``fully_shard``, are ``DTensor`` with equal placements: one
    ``Shard``, beside ``Replicate`` on a second mesh dimension for hybrid sharding. The result is
    that of the whole tensors, bit for bit; only counts are communicated. Every rank of the mesh
    must call, and every rank raises the same error.

    Returns:
        New masks on the devices of the scores, placed as the scores.

    Raises:
        ValueError: if names, shapes or placements differ, a score is NaN, the sparsity is not
            finite, outside [0, 1), unreachable or not that of ``n_m``, a tensor does not fit, or
            an option is unknown or does not go with the granularity.
        TypeError: if a score is no floating tensor, or ``n_m`` no pair of integers.
        NotImplementedError: if shards are placed in a way that the selection does not know.
    """
    sparsity = require_sparsity(sparsity, _WHERE)
    require_scope(scope, _WHERE)
    require_min_keep(min_keep_per_layer, _WHERE)
    require_min_keep(min_keep_per_unit, _WHERE, "min_keep_per_unit")
    require_granularity(granularity, n_m, on_misfit, min_keep_per_unit, _WHERE)
    _validate(scores, masks)
    ranks = _shards.Ranks.of({name: scores[name] for name in masks}, process_group, _WHERE)
    with torch.no_grad():
        pool = Pool.of(scores, masks, monotone, absolute, ranks, _WHERE)
        if n_m is not None:
            flat = _runs(pool, n_m, on_misfit, sparsity, scope, min_keep_per_layer)
        elif granularity == "row":
            rows = structured.Rows(pool, min_keep_per_layer, _WHERE)
            flat = _choose(rows, pool, sparsity, scope)
        else:
            if min_keep_per_unit:
                pool = structured.protect_units(pool, min_keep_per_unit, _WHERE)
            flat = _choose(_Elements(pool, min_keep_per_layer), pool, sparsity, scope)
        chosen = {
            name: _shards.placed_like(keep.view(_shards.local(scores[name]).shape), scores[name])
            for name, keep in zip(masks, flat, strict=True)
        }
    return MaskSet(chosen, aliases=masks.aliases, metadata=masks.metadata)


class _Units(Protocol):
    """What goes as one: elements or rows."""

    bounds: list[int]  # how many elements of each tensor can be off

    def together(self, off: int) -> list[Tensor]:
        """Keep masks (numel,) with ``off`` elements off in all tensors together."""

    def apart(self, counts: Sequence[int]) -> list[Tensor]:
        """Keep masks (numel,) with ``counts`` elements off per tensor."""


def _choose(units: _Units, pool: Pool, sparsity: float, scope: str | LayerPlan) -> list[Tensor]:
    off, present = round(sparsity * sum(pool.sizes)), sum(pool.inactive)
    if off <= present:
        return [pool.present(i) for i in range(len(pool.layers))]
    if scope == "global":
        _require_reachable(off, units.bounds, pool.sizes, sparsity)
        return units.together(off)
    ideal = planned_zeros(scope, pool.shapes(), sparsity)
    caps = [c if i else g for c, i, g in zip(units.bounds, ideal, pool.inactive, strict=True)]
    _require_reachable(off, caps, pool.sizes, sparsity)
    return units.apart(apportion(ideal, off, pool.inactive, caps))


class _Elements:
    """Single elements."""

    def __init__(self, pool: Pool, min_keep: int) -> None:
        self._pool = pool
        self.bounds = pool.bounds(min_keep)

    def apart(self, counts: Sequence[int]) -> list[Tensor]:
        return [self._pool.smallest([i], count)[0] for i, count in enumerate(counts)]

    def together(self, off: int) -> list[Tensor]:
        """One threshold; a tensor that would lose more than its bound is settled by itself.

        Settling a tensor at its bound only raises what the others lose, so a settled one never
        comes back and the loop ends.
        """
        settled: dict[int, Tensor] = {}
        while True:
            open_layers = [i for i in range(len(self.bounds)) if i not in settled]
            rest = off - sum(self.bounds[i] for i in settled)
            keeps = self._pool.smallest(open_layers, rest)
            lost = self._pool.off(open_layers, keeps)
            over = [i for i, n in zip(open_layers, lost, strict=True) if n > self.bounds[i]]
            if not over:
                settled.update(zip(open_layers, keeps, strict=True))
                return [settled[i] for i in range(len(self.bounds))]
            del keeps
            for i in over:
                settled[i] = self._pool.smallest([i], self.bounds[i])[0]


def _runs(
    pool: Pool,
    n_m: tuple[int, int],
    on_misfit: str,
    sparsity: float,
    scope: str | LayerPlan,
    min_keep: int,
) -> list[Tensor]:
    n, m = n_m
    if scope not in ("global", "layer"):
        raise ValueError(
            f"{_WHERE}: scope must be 'global' or 'layer' with granularity 'n:m', which gives all "
            f"tensors the same sparsity, got {scope!r}"
        )
    if abs(sparsity - (1 - n / m)) > 1e-9:
        raise ValueError(
            f"{_WHERE}: sparsity must be 1 - n / m = {1 - n / m:.6g} for n_m {n_m}, got {sparsity}"
        )
    skipped = structured.misfits(pool.shapes(), m)
    if skipped and on_misfit == "raise":
        shape = tuple(pool.shapes()[skipped[0]])
        raise ValueError(
            f"{_WHERE}: the inputs of {skipped[0]}, its second dimension, must divide by m = {m}, "
            f"got shape {shape}; on_misfit='skip' leaves such tensors as they are"
        )
    structured.warn_of_skipped(skipped, m, _WHERE)
    keeps = structured.n_of_m(pool, n, m, skipped, _WHERE)
    lost = pool.off(range(len(keeps)), keeps)
    for layer, off, bound in zip(pool.layers, lost, pool.bounds(min_keep), strict=True):
        if off > bound:
            raise ValueError(
                f"{_WHERE}: min_keep_per_layer must be within what {n}:{m} keeps of {layer.name}, "
                f"got {min_keep}"
            )
    return keeps


def require_scope(scope: str | LayerPlan, where: str) -> None:
    """ValueError unless ``select`` knows the scope."""
    if not isinstance(scope, LayerPlan) and scope not in SCOPES:
        raise ValueError(f"{where}: scope must be one of {SCOPES} or a LayerPlan, got {scope!r}")


def require_min_keep(min_keep: int, where: str, name: str = "min_keep_per_layer") -> None:
    """ValueError unless it is a count."""
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 0:
        raise ValueError(f"{where}: {name} must be at least 0, got {min_keep!r}")


def require_granularity(
    granularity: str,
    n_m: tuple[int, int] | None,
    on_misfit: str,
    min_keep_per_unit: int,
    where: str,
) -> None:
    """ValueError or TypeError unless the granularity is known and its options go with it."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"{where}: granularity must be one of {GRANULARITIES}, got {granularity!r}"
        )
    if on_misfit not in ("raise", "skip"):
        raise ValueError(f"{where}: on_misfit must be 'raise' or 'skip', got {on_misfit!r}")
    if min_keep_per_unit and granularity != "element":
        raise ValueError(
            f"{where}: min_keep_per_unit must be 0 with granularity {granularity!r}, "
            f"got {min_keep_per_unit}"
        )
    if granularity != "n:m":
        if n_m is not None:
            raise ValueError(
                f"{where}: n_m must be None with granularity {granularity!r}, got {n_m!r}"
            )
        return
    if not isinstance(n_m, tuple) or len(n_m) != 2 or not all(type(part) is int for part in n_m):
        raise TypeError(f"{where}: n_m must be two integers with granularity 'n:m', got {n_m!r}")
    if not 0 < n_m[0] < n_m[1]:
        raise ValueError(f"{where}: n_m must be (n, m) with 0 < n < m, got {n_m}")


def _validate(scores: Mapping[str, Tensor], masks: MaskSet) -> None:
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
        if not _shards.same_placement(score, mask):
            raise ValueError(
                f"{_WHERE}: score {name} must be placed as its mask, "
                f"{_shards.placement(mask)}, got {_shards.placement(score)}"
            )


def _require_reachable(
    off: int, bounds: Sequence[int], sizes: Sequence[int], sparsity: float
) -> None:
    if off > sum(bounds):
        reachable = math.floor(1e6 * sum(bounds) / sum(sizes)) / 1e6
        raise ValueError(
            f"{_WHERE}: sparsity must be at most {reachable} with these minima to keep and this "
            f"scope, got {sparsity}"
        )
