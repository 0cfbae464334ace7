"""Runs plans on numbers: leaves, steps level by level, then the sum over paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import chain, listed
from sapwood.nesy.draws import Leaf, Listed
from sapwood.nesy.expressions import Observed
from sapwood.nesy.kernels import Reduce
from sapwood.nesy.plan import Group, Plan
from sapwood.nesy.supports import Support
from sapwood.ops.logsemiring import logsumexp


def log_sum(x: Tensor) -> Tensor:
    """The log-sum-exp over the last dimension."""
    return logsumexp(x, -1)


class Places:
    """Where values of data lie in a support, counted from 1, as a tensor computation."""

    _known: ClassVar[dict[Support, Places]] = {}

    def __init__(self, support: Support) -> None:
        self.first = support.first_integer
        self.count = len(support)
        numbers = [
            (float(v), i) for i, v in enumerate(support.values) if isinstance(v, int | float)
        ]
        numbers.sort()
        self._values = torch.tensor([v for v, _ in numbers], dtype=torch.float64)
        self._places = torch.tensor([i for _, i in numbers], dtype=torch.int64)

    @classmethod
    def of(cls, support: Support) -> Places:
        """The table of a support; the ones used are kept."""
        found = cls._known.get(support)
        if found is None:
            if len(cls._known) >= 4096:
                cls._known.clear()
            found = cls._known[support] = cls(support)
        return found

    def __call__(self, values: Tensor) -> Tensor:
        """(...) values to int64 places; 0 or one more than there are values for unknown ones."""
        if self.first is not None and not values.is_floating_point():
            shifted = values.long() - (self.first - 1) if self.first != 1 else values.long()
            return shifted.clamp(0, self.count + 1)
        if len(self._values) == 0:
            return torch.zeros_like(values, dtype=torch.int64)
        wide = values.double()
        known = self._values.to(values.device)
        near = torch.searchsorted(known, wide).clamp(max=len(known) - 1)
        places = self._places.to(values.device)[near]
        return torch.where(known[near] == wide, places + 1, 0)


class Execution:
    """One run of a plan.

    Args:
        plan: what to do.
        leaves: by the numbers of the plan.
        columns: the data.
        batch: rows, or None for a program without rows.
        dtype: of the weights; None for that of the networks.
        reduce: sums over the last dimension.
        prepare: applied to the weights of every slot of leaves.
        copies: independent runs of each row, as more rows.
    """

    def __init__(
        self,
        plan: Plan,
        leaves: Sequence[Leaf],
        columns: Sequence[Observed],
        batch: int | None,
        dtype: torch.dtype | None = None,
        *,
        reduce: Reduce = log_sum,
        prepare: Callable[[Tensor], Tensor] | None = None,
        copies: int = 1,
    ) -> None:
        self.plan = plan
        self.batch = batch
        self._rows = (1 if batch is None else batch) * copies
        self._copies = copies
        self._columns = columns
        self._reduce = reduce
        self.slots = _leaf_slots(plan, leaves, batch, dtype)
        self._device = self.slots[0].device if self.slots else torch.device("cpu")
        self._dtype = self.slots[0].dtype if self.slots else dtype or torch.get_default_dtype()
        if copies > 1:
            self.slots = [
                s.expand(self._rows // copies, -1, -1).repeat_interleave(copies, 0)
                for s in self.slots
            ]
        if prepare is not None:
            self.slots = [prepare(s) for s in self.slots]

    def run(self) -> Tensor:
        """The result: (B,), or (B, K) with the values of the result kept; no B without rows."""
        steps = chain.Steps(
            self.plan.groups,
            [self._evidence(group) if group.columns else None for group in self.plan.groups],
            [path.result for path in self.plan.paths if path.result is not None],
            self._reduce,
            self._reduce is log_sum,
        )
        paths = [path for path in self.plan.paths if path.result is not None]
        parts = [
            self._spread(kept, path.graph.supports, path.graph.kept)
            for kept, path in zip(chain.run(steps, self.slots), paths, strict=True)
        ]
        if not parts:
            size = 1 if self.plan.support is None else len(self.plan.support)
            parts = [torch.full((1, size), -math.inf, dtype=self._dtype, device=self._device)]
        total = parts[0]
        if len(parts) > 1:
            rows = listed.common_rows(parts)
            total = self._reduce(torch.stack([p.expand(rows, -1) for p in parts], -1))
        total = total.expand(self._rows, -1)
        result = total if self.plan.support is not None else total.squeeze(-1)
        return result[0] if self.batch is None and self._copies == 1 else result

    def _spread(self, kept: Tensor, supports: list[Support], variables: Any) -> Tensor:
        """The masses of one path's values at the places of all paths' values."""
        whole = self.plan.support
        if whole is None or supports[variables[0]] is whole:
            return kept
        places = torch.tensor(
            [whole.index[v] for v in supports[variables[0]].values], device=kept.device
        )
        empty = kept.new_full((kept.shape[0], len(whole)), -math.inf)
        return empty.index_copy(-1, places, kept)

    def _evidence(self, group: Group) -> Tensor:
        """(G, B): the row of the step's tables for every instance and row of the batch."""
        assert group.kernel is not None
        total: Tensor | None = None
        for instances, support, size in zip(
            group.columns, group.supports, group.kernel.evidence, strict=True
        ):
            values = [self._columns[i].values for i in instances]
            stacked = values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
            places = Places.of(support)(stacked)
            total = places if total is None else total * size + places
        assert total is not None
        return total if self._copies == 1 else total.repeat_interleave(self._copies, 1)


def _leaf_slots(
    plan: Plan, leaves: Sequence[Leaf], batch: int | None, dtype: torch.dtype | None
) -> list[Tensor]:
    """(B or 1, leaves, entries) per slot; one call per source."""
    found: dict[int, Tensor] = {}
    constant = [
        not numbers or isinstance(leaves[numbers[0]].source, Listed) for numbers in plan.slots
    ]
    for slot in sorted(range(len(constant)), key=constant.__getitem__):  # networks decide the type
        numbers = plan.slots[slot]
        if not numbers:
            like = next(iter(found.values()), torch.zeros(0, dtype=dtype))
            found[slot] = like.new_zeros(1, 1, 1)
            continue
        source = leaves[numbers[0]].source
        columns = zip(*(leaves[n].inputs for n in numbers), strict=True)
        inputs = [c[0] if len(c) == 1 else torch.cat(c) for c in columns]
        some = next(iter(found.values()), None)
        kind = some.dtype if constant[slot] and some is not None else dtype
        weights = source.log_weights(*inputs, dtype=kind)
        if some is not None and constant[slot]:
            weights = weights.to(some.device)
        depth = 1 + (source.parent_support is not None)
        if weights.dim() == depth:
            weights = weights.unsqueeze(0)
        if inputs:
            rows = weights.shape[0] // len(numbers)
            flat = weights.reshape(len(numbers), rows, math.prod(weights.shape[1:]))
        else:  # the same weights for all
            flat = weights.reshape(1, 1, -1).expand(len(numbers), 1, -1)
        if batch is not None and flat.shape[1] not in (1, batch):
            _check.fail(
                ValueError, f"nesy.{source.name}", "net's output", f"have {batch} rows per input",
                flat.shape[1],
            )  # fmt: skip
        found[slot] = flat.transpose(0, 1)
    return [found[s] for s in range(len(plan.slots))]
