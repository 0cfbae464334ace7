"""Identities of units as integer tensors: comparing, joining and reducing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNKNOWN = -1
#: Operators that Python also calls in place (``__iadd__``) or from the right (``__radd__``).
_PREFIXED = ("add", "sub", "mul", "div", "truediv")


def plain_name(func: Any) -> str:
    """``add`` for add, add_, __add__, __iadd__ and __radd__."""
    name = getattr(func, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        return inner[1:] if inner[:1] in ("i", "r") and inner[1:] in _PREFIXED else inner
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def mean_square(x: Tensor, axis: int) -> Tensor:
    """(C,) float32 over batch and places."""
    rows = x.detach().movedim(axis, -1).flatten(0, -2)
    return rows.float().square().mean(0).cpu()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for part in value.values() for x in tensors_in(part)]
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in tensors_in(part)]
    return []


def distinct(*ids: Tensor) -> tuple[Tensor, ...]:
    """The same identities without the repetitions that all of them got by being expanded."""
    first = ids[0]
    for dim in range(first.dim()):
        if all(x.stride(dim) == 0 for x in ids):
            ids = tuple(x.narrow(dim, 0, min(1, x.shape[dim])) for x in ids)
    return ids


def varying(ids: Tensor) -> list[int]:
    """The axes, counted from the end, along which units differ; unknown places do not count."""
    (few,) = distinct(ids)
    found = []
    for dim in range(-few.dim(), 0):
        highest = few.amax(dim)
        lowest = torch.where(few == UNKNOWN, highest.unsqueeze(dim), few).amin(dim)
        if bool((lowest != highest).any()):
            found.append(dim)
    return found


def everywhere(ids: Tensor) -> Tensor:
    """The same identities, also at places where nothing was known, such as a class token's."""
    same = [dim for dim in range(-ids.dim(), 0) if dim not in varying(ids)]
    return distinct(ids)[0].amax(same, keepdim=True).expand(ids.shape) if same else ids


def mapped(ids: Tensor, roots: Tensor) -> Tensor:
    """The units that these are joined to."""
    return torch.where(ids == UNKNOWN, UNKNOWN, roots[ids.clamp_min(0)]) if len(roots) else ids


def roots(count: int, pairs: list[Tensor]) -> Tensor:
    """(count,) the smallest unit that each one is joined to."""
    roots = torch.arange(count)
    if not pairs:
        return roots
    a, b = torch.cat(pairs).T
    while True:
        least = torch.minimum(roots[a], roots[b])
        new = roots.scatter_reduce(0, roots[a], least, "amin")
        new = new.scatter_reduce(0, roots[b], least, "amin")
        new = new[new]
        if torch.equal(new, roots):
            return roots
        roots = new
