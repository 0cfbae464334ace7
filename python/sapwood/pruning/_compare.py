"""Two mask sets beside each other: whether they fit, and how much they agree."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sapwood.pruning._names import shape_of

#: Name -> (kept, total).
Counts = Mapping[str, tuple[int, int]]


def require_same_shapes(
    mine: Mapping[str, Tensor], other: Mapping[str, Tensor], where: str
) -> None:
    """ValueError unless names and shapes are equal."""
    if set(mine) != set(other):
        differing = sorted(set(mine) ^ set(other))
        raise ValueError(
            f"{where}: other must have the same names, got a difference in "
            f"{', '.join(repr(name) for name in differing[:5])}"
        )
    for name, mask in mine.items():
        if mask.shape != other[name].shape:
            expected, actual = shape_of(mask), shape_of(other[name])
            raise ValueError(f"{where}: {name} must have shape {expected}, got {actual}")


def overlap(mine: Counts, theirs: Counts, both: Counts, kind: str, where: str) -> float:
    """See ``MaskSet.overlap``.

    Raises:
        ValueError: if the kind is unknown.
    """
    shared = float(sum(kept for kept, _ in both.values()))
    kept = sum(k for k, _ in mine.values())
    if kind == "jaccard":
        numerator, denominator = shared, kept + sum(k for k, _ in theirs.values()) - shared
    elif kind == "keep_share":
        numerator, denominator = shared, float(kept)
    elif kind == "chance_corrected":
        best = sum(min(mine[name][0], theirs[name][0]) for name in mine)
        chance = sum(mine[n][0] * theirs[n][0] / total for n, (_, total) in mine.items() if total)
        numerator, denominator = shared - chance, best - chance
    else:
        raise ValueError(
            f"{where}: kind must be 'jaccard', 'keep_share' or 'chance_corrected', got {kind!r}"
        )
    return numerator / denominator if denominator else 1.0


def asks_for_more(sparsity: float, counts: Counts) -> bool:
    """Whether a sparsity switches off more than is off already."""
    total = sum(n for _, n in counts.values())
    return round(sparsity * total) > total - sum(kept for kept, _ in counts.values())
