"""Channels behind a norm that are affine in two features of it, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sapwood.minimize.layers import Affine, Holds

__all__ = ["FEATURE", "Tail"]

#: Why the features that a norm appends stay.
FEATURE = "feature of channels removed before"


@dataclass(eq=False)
class Tail:
    """The output of one norm whose removed channels may be carried by appended features.

    ``mask`` marks channels that are constant at the input of the norm but not at its output. They
    can go if all readers are linear per token and take the features: one that is not blocks the
    tail. ``existing`` says that an earlier pass appended features already.
    """

    norm: str
    mask: Tensor  # (n,) bool
    constants: Tensor  # (n,) float64, at the input of the norm
    features: int  # 2 for LayerNorm, 1 for RMSNorm
    existing: bool
    channels: Tensor  # (n,) atoms
    readers: list[Affine] = field(default_factory=list)
    blocked: bool = False
    worthwhile: bool = True

    @property
    def active(self) -> bool:
        return self.worthwhile and not self.blocked

    def carried(self, holds: Holds) -> Tensor:
        """(n,) bool: the removed channels that a reader still uses."""
        used = torch.zeros_like(self.mask)
        for reader in self.readers:
            rows = reader.connected[reader.rows(holds)][:, : len(used)]
            used = used | rows.any(0)
        return used & self.mask & ~holds(self.channels)

    def applied(self, holds: Holds) -> bool:
        """Whether the norm appends features after surgery that its readers must be given."""
        changed = not bool(holds(self.channels).all())
        return self.active and changed and (self.existing or bool(self.carried(holds).any()))

    def settle(self, holds: Holds) -> bool:
        """Gives up features that save no more than they cost; returns whether it did."""
        count = int(self.carried(holds).sum())
        if self.existing or not self.active or not 0 < count <= self.features:
            return False
        self.worthwhile = False
        return True
