"""Listed entries: what elimination does most.

Rows look up their list of entries, multiply the weights of each entry, and then sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sapwood.nesy.supports import Indices


class Lists:
    """The entries of all instances of a step, as places in the slots that it reads.

    Args:
        table: (E, operands, terms) places in each operand, -1 for none.
        offsets: per instance and operand, where it begins in the slots laid end to end.
        total: entries of these slots per row of the batch.
        kept_size: results of an instance; a list of the same length belongs to each.
    """

    def __init__(
        self, table: Indices, offsets: Sequence[Sequence[int]], total: int, kept_size: int
    ) -> None:
        begin = np.asarray(offsets, dtype=np.int64)[:, None, :, None]  # (G, 1, operands, 1)
        places = np.where(table < 0, total, table + begin)  # (G, E, operands, terms)
        self.instances, self.evidence, self.operands, terms = places.shape
        self.shape = (self.instances, self.operands, kept_size, terms // kept_size)
        self.places = torch.from_numpy(places.reshape(self.instances * self.evidence, -1))

    def index(self, evidence: Tensor | None, rows: int, like: Tensor) -> Tensor:
        """(B, G * operands * terms): where each row finds its terms."""
        if self.places.device != like.device:
            self.places = self.places.to(like.device)
        if evidence is None:
            return self.places.view(1, -1).expand(rows, -1)
        if self.instances > 1:
            first = torch.arange(0, len(self.places), self.evidence, device=like.device)
            evidence = evidence + first.unsqueeze(1)
        return self.places.index_select(0, evidence.T.flatten()).view(
            rows, self.instances * self.places.shape[1]
        )


def rows(evidence: Tensor | None, slots: Sequence[Tensor]) -> int:
    """B of a step."""
    return common_rows(slots) if evidence is None else evidence.shape[1]


def common_rows(tensors: Iterable[Tensor]) -> int:
    """The length that all tensors have, but those of length 1."""
    return next((len(t) for t in tensors if len(t) != 1), 1)


def picked(lists: Lists, index: Tensor, slots: Sequence[Tensor]) -> Tensor:
    """(B, G, kept, width) log weights of the entries at ``index``, -inf in empty places."""
    count, first = len(index), slots[0]
    flat = [s.expand(count, -1, -1).flatten(1) for s in slots]
    flat.append(first.new_full((1, 1), -math.inf).expand(count, 1))
    found = torch.cat(flat, 1).gather(1, index).view(count, *lists.shape)
    return found.squeeze(2) if lists.operands == 1 else found.sum(2)


def terms(lists: Lists, evidence: Tensor | None, slots: Sequence[Tensor]) -> Tensor:
    """(B, G, kept, width) log weights of all entries.

    Args:
        lists: the entries.
        evidence: (G, B) int64 rows of the tables, if there is evidence that differs by row.
        slots: (B or 1, n, size) each.
    """
    return picked(lists, lists.index(evidence, rows(evidence, slots), slots[0]), slots)
