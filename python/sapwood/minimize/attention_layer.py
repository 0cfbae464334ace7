"""Attention as the analysis sees it: dimensions of scores and values, and whole heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._facts import CONSTANT
from sapwood.minimize.layers import Edit, Holds, Layer, indices

__all__ = ["AttentionLayer", "Projection"]


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values: what each of their dimensions reads, and which are constants."""

    atoms: Tensor | None  # (in,)
    connected: Tensor  # (heads, d, in) bool
    foldable: Tensor  # (in,) bool: constant inputs
    constants: Tensor  # (in,) float64
    kinds: Tensor  # (heads, d) uint8
    values: Tensor  # (heads, d) float64, where the kind is CONSTANT
    biased: bool

    @property
    def constant(self) -> Tensor:
        """(heads, d) bool: the same number for every token."""
        return self.kinds == CONSTANT

    @property
    def zero(self) -> Tensor:
        """(heads, d) bool."""
        return self.constant & (self.values == 0)

    def columns(self, rows: Tensor) -> Tensor:
        """(in,) bool: what dimensions (heads, d) read and cannot fold."""
        return self.connected[rows].any(0) & ~self.foldable

    def kept(self, holds: Holds) -> Tensor:
        """(in,) bool."""
        if self.atoms is None:
            return torch.ones(len(self.foldable), dtype=torch.bool)
        return holds(self.atoms)

    def removed_constants(self, holds: Holds) -> dict[int, float]:
        """Column -> value, of the removed columns that held a constant other than 0."""
        gone = ~self.kept(holds) & (self.constants != 0)
        return {j: self.constants[j].item() for j in indices(gone)}


@dataclass(frozen=True)
class _Part:
    """What stays: per key-value head the dimensions, and the heads."""

    scores: dict[int, list[int]]
    merged: dict[int, list[tuple[int, float]]]
    values: dict[int, list[int]]
    heads: list[int]


@dataclass
class AttentionLayer(Layer):
    """One attention.

    A dimension of the scores goes if its query is zero for every head, or its key is constant over
    the keys, which shifts all scores of a row alike; several constant query dimensions become one.
    A dimension of the values goes if nobody reads it, or if it is constant: the weights of a row
    add up to one, so that the constant goes through unchanged (not where a mask may hide all keys).
    A head without values goes.
    """

    module: str
    q: Projection
    k: Projection
    v: Projection
    writes: Tensor | None  # (out,) atoms
    reads: Tensor  # (out, heads, d) bool, of the output projection
    kv_of_head: tuple[int, ...]
    complete: bool  # the weights of every row add up to one
    round_to: int
    out_biased: bool

    def rows(self, holds: Holds) -> Tensor:
        """(out,) bool."""
        if self.writes is None:
            return torch.ones(len(self.reads), dtype=torch.bool)
        return holds(self.writes)

    def foldable_values(self) -> Tensor:
        """(kv heads, d) bool."""
        return self.v.constant if self.complete else self.v.zero

    def _part(self, holds: Holds, *, empty: bool = False) -> _Part:
        """What stays for the channels that are held; ``empty`` allows no head at all."""
        read = self.reads[self.rows(holds)].any(0)  # (heads, d)
        live = ~self.foldable_values()
        groups = sorted(set(self.kv_of_head))
        values = {
            g: indices(
                live[g] & read[[h for h, kv in enumerate(self.kv_of_head) if kv == g]].any(0)
            )
            for g in groups
        }
        heads = [
            h for h, g in enumerate(self.kv_of_head) if values[g] and bool(read[h, values[g]].any())
        ]
        if not heads and not empty:
            heads = [0]
            values[self.kv_of_head[0]] = [0]
        scores: dict[int, list[int]] = {}
        merged: dict[int, list[tuple[int, float]]] = {}
        for g in sorted({self.kv_of_head[h] for h in heads}):
            members = [h for h in heads if self.kv_of_head[h] == g]
            dims = indices(~self.q.zero[members].all(0) & ~self.k.constant[g])
            merged[g] = self._mergeable(members, dims)
            gone = {d for d, _ in merged[g]}
            scores[g] = [d for d in dims if d not in gone]
        return _Part(scores, merged, {g: values[g] for g in scores}, heads)

    def _mergeable(self, members: list[int], dims: list[int]) -> list[tuple[int, float]]:
        """Constant query dimensions of a head with keys of its own: one key dimension for all."""
        if len(members) != 1:
            return []
        (head,) = members
        found = [(d, self.q.values[head, d].item()) for d in dims if bool(self.q.constant[head, d])]
        return found if len(found) > 1 else []

    def demand(self, holds: Holds) -> Tensor:
        return self._read(self._part(holds, empty=True))

    def balance(self, holds: Holds) -> Tensor:
        """At least one head, once it is known that none is needed."""
        return self._read(self._part(holds))

    def _read(self, part: _Part) -> Tensor:
        q, k, v = (torch.zeros_like(p.constant) for p in (self.q, self.k, self.v))
        for g, dims in part.scores.items():
            every = dims + [d for d, _ in part.merged[g]]
            k[g, every] = True
            v[g, part.values[g]] = True
        for head in part.heads:
            q[head, part.scores[self.kv_of_head[head]]] = True
        needed = [
            p.atoms[p.columns(rows)]
            for p, rows in ((self.q, q), (self.k, k), (self.v, v))
            if p.atoms is not None
        ]
        return torch.cat([*needed, torch.empty(0, dtype=torch.int64)])

    def edits(self, holds: Holds) -> list[Edit]:
        part = self._part(holds)
        rows = self.rows(holds)
        roles = {"q": self.q, "k": self.k, "v": self.v}
        kept = {role: p.kept(holds) for role, p in roles.items()}
        if self._unchanged(part) and all(bool(t.all()) for t in (rows, *kept.values())):
            return []
        constants = {role: p.removed_constants(holds) for role, p in roles.items()}
        folding = any(constants.values()) or any(part.merged.values())
        edit: dict[str, Any] = {
            "op": "attention",
            "module": self.module,
            "groups": [
                {
                    "kv": g,
                    "qk": part.scores[g],
                    "merged": [list(pair) for pair in part.merged[g]],
                    "v": part.values[g],
                }
                for g in part.scores
            ],
            "heads": [{"head": h, "kv": self.kv_of_head[h]} for h in part.heads],
            "kept": {role: indices(t) for role, t in kept.items()},
            "constants": {r: {str(j): c for j, c in v.items()} for r, v in constants.items()},
            "folded": self._folded(part),
            "rows": indices(rows),
            "needs_bias": folding,
            "round_to": self.round_to if self._rounds(part) else 1,
        }
        return [edit]

    def _widths(self, part: _Part) -> tuple[int, int]:
        scores = max(len(d) + bool(part.merged[g]) for g, d in part.scores.items())
        return max(1, scores), max(1, *(len(d) for d in part.values.values()), 1)

    def _unchanged(self, part: _Part) -> bool:
        heads, qk = self.q.kinds.shape
        return len(part.heads) == heads and self._widths(part) == (qk, self.v.kinds.shape[1])

    def _rounds(self, part: _Part) -> bool:
        """Rounding up must not exceed the width that there was."""
        old = (self.q.kinds.shape[1], self.v.kinds.shape[1])
        up = [-(-w // self.round_to) * self.round_to for w in self._widths(part)]
        return all(new <= before for new, before in zip(up, old, strict=True))

    def _folded(self, part: _Part) -> list[list[float]]:
        """(column of the output projection, constant) for value dimensions that go as constants."""
        width = self.v.kinds.shape[1]
        foldable = self.foldable_values()
        folded: list[list[float]] = []
        for head, g in enumerate(self.kv_of_head):
            stays = part.values.get(g, []) if head in part.heads else []
            for d in indices(foldable[g] & (self.v.values[g] != 0)):
                if d not in stays:
                    folded.append([head * width + d, self.v.values[g, d].item()])
        return folded
