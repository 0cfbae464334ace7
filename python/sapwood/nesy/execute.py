"""Runs plans on numbers: leaves, steps level by level, then the sum over paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood import _check
from sapwood.nesy import chain, circuits
from sapwood.nesy.chain import Steps, slot_of
from sapwood.nesy.draws import Leaf, Listed
from sapwood.nesy.kernels import Reduce
from sapwood.nesy.plan import Plan
from sapwood.nesy.supports import Support
from sapwood.nesy.symbols import Categorical
from sapwood.ops.logsemiring import logsumexp


def log_sum(x: Tensor) -> Tensor:
    """The log-sum-exp over the last dimension."""
    return logsumexp(x, -1)


class Execution:
    """One run of a plan.

    Args:
        plan: what to do.
        leaves: by the numbers of the plan.
        columns: the data, (B,) each or (B, C) together.
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
        columns: Sequence[Tensor] | Tensor,
        batch: int | None,
        dtype: torch.dtype | None = None,
        *,
        reduce: Reduce = log_sum,
        prepare: Callable[[Tensor], Tensor] | None = None,
        copies: int = 1,
    ) -> None:
        self.plan = plan
        self.batch = batch
        self._fast = reduce is log_sum
        rows = (1 if batch is None else batch) * copies
        self._leaves, raw = _leaf_weights(plan, leaves, batch, dtype, defer=self._fast)
        self._raw = raw
        self._steps = Steps(plan, columns, rows, reduce, copies)
        self._device = self._leaves[0].device if self._leaves else torch.device("cpu")
        self._dtype = self._leaves[0].dtype if self._leaves else dtype or torch.get_default_dtype()
        #: Per slot of leaves (B or 1, n, entries), after copies and preparation.
        self.slots: list[Tensor] = []
        if not self._fast:
            self.slots = [self._prepared(n, prepare) for n in range(len(plan.slots))]

    def _prepared(self, number: int, prepare: Callable[[Tensor], Tensor] | None) -> Tensor:
        slot = slot_of(self._leaves[number], max(1, len(self.plan.slots[number])))
        if self._steps.copies > 1:
            copies = self._steps.copies
            slot = slot.expand(self._steps.rows // copies, -1, -1).repeat_interleave(copies, 0)
        return slot if prepare is None else prepare(slot)

    def run(self) -> Tensor:
        """The result: (B,), or (B, K) with the values of the result kept; no B without rows."""
        parts = self._parts()
        if not parts:
            size = (1,) if self.plan.support is None else (1, len(self.plan.support))
            parts = [torch.full(size, -math.inf, dtype=self._dtype, device=self._device)]
        total = parts[0]
        if len(parts) > 1:
            total = self._steps.reduce(torch.stack(torch.broadcast_tensors(*parts), -1))
        if self.batch is None and self._steps.copies == 1:
            return total[0]
        rows = self._steps.rows
        return total if len(total) == rows else total.expand(rows, *total.shape[1:])

    def _parts(self) -> list[Tensor]:
        """The masses of each path, (B or 1,) or (B or 1, K)."""
        if not self.plan.results:
            return []
        if self._fast:
            steps = self._steps
            results = circuits.run(self.plan, self._leaves, self._raw, steps.columns, steps.rows)
        else:
            results = chain.plain(self._steps, self.slots)
        if self.plan.support is None:
            return [x.squeeze(-1) for x in results]
        paths = [path for path in self.plan.paths if path.result is not None]
        return [
            self._spread(kept, path.graph.supports, path.graph.kept)
            for kept, path in zip(results, paths, strict=True)
        ]

    def _spread(self, kept: Tensor, supports: list[Support], variables: Any) -> Tensor:
        """The masses of one path's values at the places of all paths' values."""
        whole = self.plan.support
        assert whole is not None
        if supports[variables[0]] is whole:
            return kept
        places = torch.tensor(
            [whole.index[v] for v in supports[variables[0]].values], device=kept.device
        )
        empty = kept.new_full((kept.shape[0], len(whole)), -math.inf)
        return empty.index_copy(-1, places, kept)


def _leaf_weights(
    plan: Plan, leaves: Sequence[Leaf], batch: int | None, dtype: torch.dtype | None, *, defer: bool
) -> tuple[list[Tensor], frozenset[int]]:
    """The weights of each slot, its n leaves in order: (n * (B or 1), ...); one call per source.

    With ``defer`` also the slots whose weights are logits, still to be normalised.
    """
    raw = set[int]()
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
        if defer and type(source) is Categorical:  # not of a subclass, which may do otherwise
            raw.add(slot)
            weights = source.logits(*inputs, dtype=kind)
        else:
            weights = source.log_weights(*inputs, dtype=kind)
        if some is not None and constant[slot]:
            weights = weights.to(some.device)
        depth = 1 + (source.parent_support is not None)
        if weights.dim() == depth:
            weights = weights.unsqueeze(0)
        if not inputs:  # the same weights for all
            weights = weights.expand(len(numbers), *weights.shape[1:])
        rows = weights.shape[0] // len(numbers)
        if batch is not None and rows not in (1, batch):
            _check.fail(
                ValueError, f"nesy.{source.name}", "net's output", f"have {batch} rows per input",
                rows,
            )  # fmt: skip
        found[slot] = weights
    return [found[s] for s in range(len(plan.slots))], frozenset(raw)
