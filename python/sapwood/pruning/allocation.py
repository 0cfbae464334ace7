"""How many weights each tensor loses: uniform, Erdős-Rényi-kernel, or planned by hand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sapwood._files import atomic_write_bytes
from sapwood.pruning._names import MaskMatchError, closest

if TYPE_CHECKING:
    from sapwood.pruning.masks import MaskSet

__all__ = ["LayerPlan", "erk_densities"]

_PLAN_FORMAT = "sapwood.layer_plan/1"


def require_sparsity(sparsity: float, where: str, name: str = "sparsity") -> float:
    """A finite number in [0, 1), as float."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(sparsity).__name__}")
    if not math.isfinite(sparsity) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{where}: {name} must be finite and in [0, 1), got {sparsity}")
    return float(sparsity)


def erk_densities(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-kernel densities: thin tensors stay denser than wide ones.

    The density of a tensor is ``min(1, eps * sum(shape) / prod(shape))``, with ``eps`` such that
    the whole set has the wanted sparsity; tensors that reach 1 are fixed and ``eps`` is solved
    again.

    Example:
        >>> from sapwood.pruning import erk_densities
        >>> densities = erk_densities({"a": (100, 100), "b": (10, 100)}, 0.8)
        >>> {name: round(density, 4) for name, density in densities.items()}
        {'a': 0.1419, 'b': 0.7806}

    Args:
        shapes: name -> weight shape, (out, in) or (out, in / groups, *kernel).
        sparsity: share of all elements to switch off, in [0, 1).

    Returns:
        name -> density in [0, 1].

    Raises:
        ValueError: if the sparsity is not finite or outside [0, 1).

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134, section 3.
    """
    sparsity = require_sparsity(sparsity, "sapwood.pruning.erk_densities")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1.0 - sparsity) * sum(sizes.values())
    dense = {name for name, size in sizes.items() if size == 0}
    while True:
        rest = budget - sum(sizes[name] for name in dense)
        fans = {name: sum(shape) for name, shape in shapes.items() if name not in dense}
        if not fans:
            break
        eps = rest / sum(fans.values())
        saturated = {name for name, fan in fans.items() if eps * fan >= sizes[name]}
        if not saturated:
            break
        dense |= saturated
    return {name: 1.0 if name in dense else eps * fans[name] / sizes[name] for name in shapes}


class LayerPlan(dict[str, float]):
    """Sparsity per tensor, or per block: a key covers the names it equals or is a prefix of.

    The longest matching key wins; prefixes end at a dot. In ``select`` and ``Pruner`` the plan
    gives proportions: it is scaled so that the whole reaches the wanted sparsity.

    Example:
        >>> from sapwood.pruning import LayerPlan
        >>> plan = LayerPlan({"features": 0.8, "classifier.weight": 0.4})
        >>> plan.resolve(["features.0.weight", "classifier.weight"])
        {'features.0.weight': 0.8, 'classifier.weight': 0.4}

    Raises:
        ValueError: if a sparsity is not finite or outside [0, 1].
    """

    def __init__(self, plan: Mapping[str, float]) -> None:
        super().__init__(plan)
        for name, value in plan.items():
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"sapwood.pruning.LayerPlan: the sparsity of {name!r} must be in [0, 1], "
                    f"got {value}"
                )

    @classmethod
    def like(cls, masks: MaskSet) -> LayerPlan:
        """The sparsities of the tensors in another mask set, for a control of equal budgets.

        With this plan as scope, ``masks.sparsity()``, dense masks and ``min_keep_per_layer=0``,
        ``select`` switches off exactly as many elements of every tensor as ``masks`` does.

        Example:
            >>> import torch
            >>> from sapwood.pruning import LayerPlan, MaskSet
            >>> LayerPlan.like(MaskSet({"w": torch.tensor([True, False, True, True])}))
            {'w': 0.25}

        Args:
            masks: the mask set whose budgets to copy.

        Returns:
            A plan with one key per tensor.
        """
        counts = masks.counts().items()
        return cls({name: 1.0 - kept / size if size else 0.0 for name, (kept, size) in counts})

    def resolve(self, names: Sequence[str]) -> dict[str, float]:
        """The planned sparsity of every name.

        Raises:
            MaskMatchError: if a name has no key, or a key no name.
        """
        used: set[str] = set()
        found: dict[str, float] = {}
        for name in names:
            keys = [key for key in self if name == key or name.startswith(f"{key}.")]
            if not keys:
                raise MaskMatchError(
                    f"sapwood.pruning.LayerPlan: the plan must cover every tensor, got no key for "
                    f"{name!r}; closest keys: {closest([name], list(self))}"
                )
            key = max(keys, key=len)
            used.add(key)
            found[name] = self[key]
        idle = [key for key in self if key not in used]
        if idle:
            raise MaskMatchError(
                f"sapwood.pruning.LayerPlan: every key must match a tensor, got no tensor for "
                f"{idle[0]!r}; closest names: {closest(idle, names)}"
            )
        return found

    def normalized(self, shapes: Mapping[str, Sequence[int]], sparsity: float) -> LayerPlan:
        """The plan for these tensors, scaled by one factor (and capped at 1) to a total sparsity.

        Args:
            shapes: name -> shape.
            sparsity: wanted share of all elements, in [0, 1).

        Returns:
            A plan with one key per name.

        Raises:
            ValueError: if the planned zeros cannot reach the sparsity.
            MaskMatchError: as in ``resolve``.
        """
        where = "sapwood.pruning.LayerPlan.normalized"
        sparsity = require_sparsity(sparsity, where)
        planned = self.resolve(list(shapes))
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        wanted = sparsity * sum(sizes.values())
        full: set[str] = set()
        while True:
            rest = wanted - sum(sizes[name] for name in full)
            weight = sum(planned[n] * sizes[n] for n in sizes if n not in full)
            factor = rest / weight if weight else 0.0
            over = {n for n in sizes if n not in full and planned[n] * factor > 1.0}
            if not over:
                break
            full |= over
        scaled = {n: 1.0 if n in full else planned[n] * factor for n in sizes}
        total = sum(sizes.values())
        reached = sum(scaled[n] * size for n, size in sizes.items()) / total if total else 0.0
        if total and reached < sparsity - 1e-9:
            raise ValueError(
                f"{where}: sparsity must be at most {reached:.6g} with this plan, got {sparsity}"
            )
        return LayerPlan(scaled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically."""
        content = {"format": _PLAN_FORMAT, "sparsity": dict(self)}
        atomic_write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Reads a plan that ``save`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no plan.
        """
        where = f"sapwood.pruning.LayerPlan.load: {path} must be a plan of {_PLAN_FORMAT}"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _PLAN_FORMAT:
                raise ValueError("another format")
            if not isinstance(content.get("sparsity"), dict):
                raise ValueError("no sparsity object")
            return cls(content["sparsity"])
        except (ValueError, RecursionError) as error:  # too deep to be read or shown
            raise ValueError(f"{where}, got {error}") from None


def planned_zeros(
    scope: str | LayerPlan, shapes: Mapping[str, torch.Size], sparsity: float
) -> list[float]:
    """The zeros each tensor should have under a layer-wise scope, before rounding."""
    if isinstance(scope, LayerPlan):
        plan = scope.resolve(list(shapes))
        return [plan[name] * math.prod(shape) for name, shape in shapes.items()]
    if scope == "erk":
        densities = erk_densities(shapes, sparsity)
        return [(1.0 - densities[name]) * math.prod(shape) for name, shape in shapes.items()]
    return [float(math.prod(shape)) for shape in shapes.values()]


def apportion(
    ideal: Sequence[float], total: int, floors: Sequence[int], caps: Sequence[int]
) -> list[int]:
    """Splits ``total`` in proportion to ``ideal`` within bounds, by largest remainders.

    A share that leaves its bounds is fixed there and the others absorb the difference, the worse
    side first. Needs ``sum(floors) <= total <= sum(caps)``; a zero ideal stays at its floor.
    """
    shares = [0.0] * len(ideal)
    fixed: dict[int, int] = {}
    while len(fixed) < len(ideal):
        free = [i for i in range(len(ideal)) if i not in fixed]
        weight = sum(ideal[i] for i in free)
        rest = total - sum(fixed.values())
        for i in free:
            shares[i] = ideal[i] / weight * rest if weight else 0.0
        low = {i: floors[i] for i in free if shares[i] < floors[i]}
        high = {i: caps[i] for i in free if shares[i] > caps[i]}
        if not low and not high:
            break
        excess = sum(floors[i] - shares[i] for i in low) - sum(shares[i] - caps[i] for i in high)
        if excess >= 0:
            fixed.update(low)
        if excess <= 0:
            fixed.update(high)
    counts = [fixed.get(i, min(math.floor(shares[i]), caps[i])) for i in range(len(ideal))]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (counts[i] - shares[i], i))
    free_units = [i for i in by_remainder if i not in fixed and counts[i] < caps[i]]
    for i in free_units[: total - sum(counts)]:
        counts[i] += 1
    return counts
