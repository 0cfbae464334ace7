"""Batches that hold every class equally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sapwood.pruning._gradients import Pair, is_pair, pairs

__all__ = ["class_balanced_batch"]


def class_balanced_batch(
    data: Pair | Iterable[Pair],
    samples_per_class: int,
    *,
    seed: int = 0,
    num_classes: int | None = None,
) -> Pair:
    """The same number of samples of every class, in turns: the batch that GraSP asks for.

    The classes alternate, so that with an even number each half of the batch holds every class
    equally, and otherwise with a difference of at most one sample.

    Example:
        >>> import torch
        >>> from sapwood.pruning import class_balanced_batch
        >>> x, y = torch.randn(6, 3), torch.tensor([1, 0, 1, 1, 0, 0])
        >>> class_balanced_batch((x, y), 2)[1]
        tensor([0, 1, 0, 1])

    Args:
        data: a pair (X, y), from which the samples are drawn at random, or an iterable of pairs
            such as a DataLoader, from which the first ones are taken. y: (n,) integers.
        samples_per_class: how many of each.
        seed: of the draw, and of the torch generator by which a DataLoader shuffles; the global
            state of torch is left as it was.
        num_classes: the classes are 0 to this, and a loader is left once they are complete.
            Default: those that occur, which takes a whole pass.

    Returns:
        X and y with ``samples_per_class`` rows of each class, on the device they came from.

    Raises:
        ValueError: if a class has too few samples or is outside the range, there is no data, y is
            not one-dimensional, or a number is below 1.
        TypeError: if the data are no pairs of tensors, or y holds no integers.

    References:
        Wang et al., arXiv:2002.07376, for balancing the classes; the order is ours.
    """
    where = "sapwood.pruning.class_balanced_batch"
    require_count(samples_per_class, "samples_per_class", where)
    if num_classes is not None:
        require_count(num_classes, "num_classes", where)
    return balanced(data, "data", samples_per_class, seed, num_classes, where)


def balanced(
    data: Any, argument: str, per_class: int, seed: int, num_classes: int | None, where: str
) -> Pair:
    """``class_balanced_batch`` for a caller of another name."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if is_pair(data):
            (x, y), order = next(pairs(data, where, argument)), torch.randperm(len(data[1]))
            _require_labels(y, num_classes, where)
        else:
            x, y = _first(pairs(data, where, argument), per_class, num_classes, where)
            order = torch.arange(len(y))
    order = order.to(y.device)
    labels, counts = y.unique(return_counts=True)
    found = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    expected = sorted(found) if num_classes is None else range(num_classes)
    short = [c for c in expected if found.get(c, 0) < per_class]
    if short:
        listed = ", ".join(f"{found.get(c, 0)} of class {c}" for c in short[:5])
        raise ValueError(
            f"{where}: {argument} must hold {per_class} samples of every class, got {listed}"
        )
    grouped = order[y[order].argsort(stable=True)]
    turn = torch.arange(per_class, device=y.device).unsqueeze(1)  # (per_class, 1)
    chosen = grouped[(counts.cumsum(0) - counts + turn).flatten()]
    return x[chosen.to(x.device)], y[chosen]


def _first(batches: Iterator[Pair], per_class: int, num_classes: int | None, where: str) -> Pair:
    """The first samples of every class, no more than needed."""
    kept: list[Pair] = []
    taken: Counter[int] = Counter()
    for x, y in batches:
        _require_labels(y, num_classes, where)
        rows: list[int] = []
        for row, label in enumerate(y.tolist()):
            if taken[label] < per_class:
                taken[label] += 1
                rows.append(row)
        if rows:
            kept.append((x[rows], y[rows]))
        if num_classes is not None and taken.total() == per_class * num_classes:
            break
    return torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])


def _require_labels(y: Tensor, num_classes: int | None, where: str) -> None:
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{where}: y must hold integer class labels, got {y.dtype}")
    if y.ndim != 1:
        raise ValueError(f"{where}: y must be one-dimensional, got {y.ndim} dimensions")
    if num_classes is not None and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise ValueError(
            f"{where}: y must be in [0, {num_classes}), got {int(y.min())} to {int(y.max())}"
        )


def require_count(count: int, argument: str, where: str) -> None:
    """ValueError unless it is a positive integer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: {argument} must be an integer of at least 1, got {count!r}")
