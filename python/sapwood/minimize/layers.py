"""Layers as the analysis sees them: who reads and writes which channels, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._tails import Tail

__all__ = [
    "Affine",
    "Edit",
    "GroupedConvolution",
    "Holds",
    "Layer",
    "Normalization",
    "Scattering",
    "Selection",
    "is_narrow",
]

#: One step of surgery, as JSON holds it.
Edit = dict[str, Any]
#: Which of the given atoms stay.
Holds = Callable[[Tensor], Tensor]

_NOTHING = torch.empty(0, dtype=torch.int64)


class Layer:
    """One layer; its edits are computed once the kept channels are known."""

    module: str

    def demand(self, holds: Holds) -> Tensor:
        """The atoms that must stay because this layer reads them."""
        raise NotImplementedError

    def edits(self, holds: Holds) -> list[Edit]:
        """The steps of surgery."""
        raise NotImplementedError

    def folded(self) -> tuple[Tensor | None, Tensor]:
        """The atoms read and the constants that they hold, 0 where they hold none."""
        return None, _NOTHING


@dataclass
class Affine(Layer):
    """A linear layer or convolution: ``connected`` (out, in) tells where its weight is not zero.

    A constant input channel j is ``foldable`` into the bias, or into a border bias where
    ``border`` says so; ``constants`` holds its value. ``axis`` is set where the layer is a module
    that is called as such, so that modules may be put around it: the axis of its channels.
    """

    module: str
    weight: str
    bias: str | None
    reads: Tensor | None  # (in,) atoms
    writes: Tensor | None  # (out,) atoms
    connected: Tensor  # (out, in) bool
    foldable: Tensor  # (in,) bool
    constants: Tensor  # (in,) float64
    border: str | None = None
    taps: str | None = None
    transposed: bool = False
    axis: int | None = None
    kernel: int = 1  # taps per weight
    tail: Tail | None = None

    def _tail_mask(self) -> Tensor:
        """(in,) bool: channels that the features of a norm can carry."""
        mask = torch.zeros_like(self.foldable)
        if self.tail is not None and self.tail.active:
            mask[: len(self.tail.mask)] = self.tail.mask
        return mask

    def folded(self) -> tuple[Tensor | None, Tensor]:
        return self.reads, self.constants

    def rows(self, holds: Holds) -> Tensor:
        """(out,) bool."""
        if self.writes is None:
            return torch.ones(self.connected.shape[0], dtype=torch.bool)
        return holds(self.writes)

    def demand(self, holds: Holds) -> Tensor:
        if self.reads is None:
            return _NOTHING
        used = self.connected[self.rows(holds)].any(0)
        return self.reads[used & ~self.foldable & ~self._tail_mask()]

    def edits(self, holds: Holds) -> list[Edit]:
        rows = self.rows(holds)
        width = self.connected.shape[1]
        kept = torch.ones(width, dtype=torch.bool) if self.reads is None else holds(self.reads)
        carried = self.tail is not None and self.tail.applied(holds)
        columns = kept if self.tail is not None else self._selected(rows, kept)
        edits = self._folds(rows, columns)
        written = rows if self.tail is not None else self._written(rows, columns)
        out_axis, in_axis = (1, 0) if self.transposed else (0, 1)
        if carried:
            edits.append(self._carries(rows, kept))
        elif not bool(columns.all()):
            edits.append(cut(self.weight, in_axis, columns))
        if not bool(written.all()):
            edits.append(cut(self.weight, out_axis, written))
        if not bool(rows.all()):
            edits += [cut(name, 0, rows) for name in self._row_vectors(edits)]
        around = {"module": self.module, "dim": self.axis}
        if not bool((columns == kept).all()):
            edits.append({"op": "select", **around, "index": indices(columns[kept])})
        if not bool((written == rows).all()):
            index, width = indices(written[rows]), int(rows.sum())
            edits.append({"op": "scatter", **around, "index": index, "width": width})
        return edits

    def _carries(self, rows: Tensor, kept: Tensor) -> Edit:
        """Columns for the features of the norm in place of those that it lost."""
        assert self.tail is not None
        size = len(self.tail.mask)
        gone = self.tail.mask & ~kept[:size] & self.connected[rows][:, :size].any(0)
        return {
            "op": "tail",
            "module": self.module,
            "norm": self.tail.norm,
            "columns": indices(gone),
            "values": self.tail.constants[gone].tolist(),
            "keep": indices(kept[:size]),
            "rows": indices(rows),
            "existing": self.tail.existing,
        }

    def _row_vectors(self, edits: list[Edit]) -> list[str]:
        """What is cut with the rows beside the weight; folding may have created a bias."""
        created = any(edit["op"] == "fold" for edit in edits) and self.bias is None
        bias = f"{self.module}.bias".lstrip(".") if created else self.bias
        return [name for name in (bias, self.taps) if name is not None]

    def _folds(self, rows: Tensor, kept: Tensor) -> list[Edit]:
        folded = self._folded(rows, kept)
        if not bool(folded.any()):
            return []
        columns = indices(folded)
        values = self.constants[folded].tolist()
        operation = self.border or "fold"
        edit = {"op": operation, "module": self.module, "columns": columns, "values": values}
        return [edit if operation == "fold" else {**edit, "rows": indices(rows)}]

    def _selected(self, rows: Tensor, kept: Tensor) -> Tensor:
        """The columns to read: fewer than the kept ones where picking them saves storage."""
        used = self.connected[rows].any(0) & kept & ~self.foldable
        if self.axis is None or self._meets_border(rows, used):
            return kept
        saved = int((kept & ~used).sum()) * int(rows.sum()) * self.kernel
        return used if is_narrow(int(used.sum()), int(kept.sum()), saved) else kept

    def _meets_border(self, rows: Tensor, columns: Tensor) -> bool:
        """Whether what is folded needs a module of its own in place of the layer."""
        return self.border is not None and bool(self._folded(rows, columns).any())

    def _folded(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(in,) bool: channels not among the columns whose constant a row reads."""
        return ~columns & self.connected[rows].any(0) & (self.constants != 0)

    def _written(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The rows to compute: fewer than the kept ones where scattering them saves storage."""
        if self.axis is None or self._meets_border(rows, columns):
            return rows
        used = self.connected[:, columns].any(1) & rows
        if not bool(used.any()):
            used[int(rows.nonzero()[0])] = True  # a layer of no rows cannot be traced again
        saved = int((rows & ~used).sum()) * int(columns.sum()) * self.kernel
        return used if is_narrow(int(used.sum()), int(rows.sum()), saved) else rows


@dataclass
class GroupedConvolution(Affine):
    """A convolution whose groups must keep equal numbers of inputs and of outputs."""

    groups: int = 1

    def balance(self, holds: Holds) -> Tensor:
        """The channels that must stay so that all groups in use are equally wide."""
        assert self.reads is not None
        assert self.writes is not None
        reads, writes = self.reads.reshape(self.groups, -1), self.writes.reshape(self.groups, -1)
        used = holds(reads).any(1) | holds(writes).any(1)
        return torch.cat([_filled(atoms[used], holds) for atoms in (reads, writes)])

    def edits(self, holds: Holds) -> list[Edit]:
        assert self.reads is not None
        rows, columns = self.rows(holds), holds(self.reads)
        if bool(rows.all()) and bool(columns.all()):
            return []
        edits = self._folds(rows, columns)
        by_group = [t.reshape(self.groups, -1) for t in (rows, columns)]
        groups = [
            {"group": group, "rows": indices(r), "columns": indices(c)}
            for group, (r, c) in enumerate(zip(*by_group, strict=True))
            if bool(r.any())
        ]
        edits.append({"op": "groups", "weight": self.weight, "groups": groups})
        edits += [cut(name, 0, rows) for name in self._row_vectors(edits)]
        return edits


@dataclass
class Normalization(Layer):
    """A norm over channels: a removed channel must have been constant, and is compensated."""

    module: str
    channels: Tensor  # (n,) atoms, of input and output
    foldable: Tensor  # (n,) bool
    constants: Tensor  # (n,) float64
    groups: int = 1
    tail: Tail | None = None

    def balance(self, holds: Holds) -> Tensor:
        """The channels that must stay so that all groups keep equal numbers of them."""
        return _filled(self.channels.reshape(self.groups, -1), holds)

    def folded(self) -> tuple[Tensor | None, Tensor]:
        return self.channels, self.constants

    def demand(self, holds: Holds) -> Tensor:
        if self.tail is not None and self.tail.existing and self.tail.blocked:
            return self.channels
        return self.channels[~self.foldable]

    def edits(self, holds: Holds) -> list[Edit]:
        kept = holds(self.channels)
        if bool(kept.all()):
            return []
        keep = indices(kept)
        constants = self.constants[~kept].tolist()
        carried = self.tail is not None and self.tail.applied(holds)
        edit = {"op": "norm", "module": self.module, "keep": keep, "constants": constants}
        return [{**edit, "tail": carried}]


@dataclass
class Selection(Layer):
    """An ``InputSelect``: its index follows the channels on both sides."""

    module: str
    index: Tensor  # (m,) int64
    reads: Tensor | None  # (n,) atoms
    writes: Tensor  # (m,) atoms

    def demand(self, holds: Holds) -> Tensor:
        return _NOTHING if self.reads is None else self.reads[self.index[holds(self.writes)]]

    def edits(self, holds: Holds) -> list[Edit]:
        index = self.index[holds(self.writes)]
        if self.reads is not None:
            kept = holds(self.reads)
            index = (kept.cumsum(0) - 1)[index]
        if torch.equal(index, self.index):
            return []
        return [{"op": "reindex", "module": self.module, "index": index.tolist()}]


@dataclass
class Scattering(Layer):
    """An ``OutputScatter``: its index follows the channels on both sides."""

    module: str
    index: Tensor  # (m,) int64
    reads: Tensor | None  # (m,) atoms
    zero: Tensor  # (m,) bool: reads that are always 0
    writes: Tensor  # (n,) atoms

    def demand(self, holds: Holds) -> Tensor:
        if self.reads is None:
            return self.writes[self.index]
        behind = self.writes[self.index]
        needed = self.reads[holds(behind) & ~self.zero]
        return torch.cat((needed, behind[holds(self.reads)]))

    def edits(self, holds: Holds) -> list[Edit]:
        kept = holds(self.writes)
        index = self.index if self.reads is None else self.index[holds(self.reads)]
        index = (kept.cumsum(0) - 1)[index]
        if bool(kept.all()) and len(index) == len(self.index):
            return []
        edit = {"op": "rescatter", "module": self.module, "index": index.tolist()}
        return [{**edit, "keep": indices(kept)}]


def is_narrow(used: int, width: int, saved: int) -> bool:
    """Whether an index of the used channels costs less than it saves, in storage and in time."""
    return 0 < used < saved and 2 * used < width


def _filled(atoms: Tensor, holds: Holds) -> Tensor:
    """(groups, n) -> atoms to add so that every group keeps as many as the fullest, and one."""
    kept = holds(atoms)
    missing = kept.sum(1).max().clamp(min=1) - kept.sum(1) if len(kept) else kept.sum(1)
    added = [row[~k][: int(n)] for row, k, n in zip(atoms, kept, missing, strict=True)]
    return torch.cat([*added, _NOTHING])


def indices(kept: Tensor) -> list[int]:
    """The places that are True."""
    return torch.arange(len(kept))[kept].tolist()


def cut(tensor: str, axis: int, kept: Tensor) -> Edit:
    """Keeps a part of one axis of a parameter or buffer."""
    return {"op": "slice", "tensor": tensor, "axis": axis, "keep": indices(kept)}
