"""Channels as atoms: which indices of which tensors live and die together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Atoms", "Space"]


@dataclass(frozen=True)
class Space:
    """The channels that one layer writes: ``width`` atoms from ``start`` on."""

    name: str
    start: int
    width: int

    @property
    def atoms(self) -> Tensor:
        """(width,) int64."""
        return torch.arange(self.start, self.start + self.width)


class Atoms:
    """A union-find over channel indices, with reasons why some of them must stay.

    An atom is one index of one axis of one tensor. Operations that tie indices together, such as a
    residual addition, unite atoms; surgery removes whole classes.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.spaces: list[Space] = []
        self.pins: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, width: int, name: str) -> Tensor:
        """(width,) fresh atoms for the channels that the layer ``name`` writes."""
        start = len(self._parent)
        self._parent.extend(range(start, start + width))
        self.spaces.append(Space(name, start, width))
        return self.spaces[-1].atoms

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, atoms: Tensor) -> Tensor:
        """The representatives, in the shape of ``atoms``."""
        flat = [self.find(atom) for atom in atoms.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int64).reshape(atoms.shape)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Ties the atoms at equal places of two tensors, which are broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack((a.flatten(), b.flatten())).unique(dim=1)
        for one, other in pairs.T.tolist():
            first, second = sorted((self.find(one), self.find(other)))
            if first != second:
                self._parent[second] = first
                if second in self.pins:
                    self.pins.setdefault(first, self.pins.pop(second))

    def pin(self, atoms: Tensor, reason: str) -> None:
        """Forbids the removal of atoms; the first reason given for a class is kept."""
        for atom in atoms.unique().tolist():
            self.pins.setdefault(self.find(atom), reason)

    def pinned(self) -> Iterable[int]:
        """Representatives of the classes that must stay."""
        return self.pins.keys()
