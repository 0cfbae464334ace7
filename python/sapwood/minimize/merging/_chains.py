"""Layers that can be multiplied out, and units that compute for nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sapwood.minimize._analysis import Outcome
from sapwood.minimize._trace import Traced, owners
from sapwood.minimize.layers import Affine, Edit, is_narrow
from sapwood.minimize.merging._paths import CONVOLUTIONS, IDENTITIES, LINEAR, parameter
from sapwood.minimize.merging._units import mergeable_layers

__all__ = ["idle_units", "products"]


def products(trace: Traced, outcome: Outcome, given_up: dict[str, str]) -> list[Edit]:
    """Chains of two linear layers whose product stores fewer numbers, the best first."""
    layers = mergeable_layers(outcome)
    found: list[tuple[int, Edit]] = []
    for node in trace.graph.nodes:
        first = _linear(trace, outcome, layers, node)
        behind = None if first is None else _only_reader(node)
        second = None if behind is None else _linear(trace, outcome, layers, behind)
        if first is None or second is None or second.module in given_up:
            continue
        if type(outcome.analysis.module(first.module)) is not type(
            outcome.analysis.module(second.module)
        ):
            continue
        saved = _saved(outcome, first, second)
        if saved > 0 and not _observed(outcome, node, first):
            edit = {"op": "multiply", "module": second.module, "first": first.module}
            found.append((saved, edit))
    taken: set[str] = set()
    edits: list[Edit] = []
    for _, edit in sorted(found, key=lambda pair: -pair[0]):
        names = {edit["module"], edit["first"]}
        if not names & taken:  # a longer chain needs another round
            taken |= names
            edits.append(edit)
    return edits


def _linear(
    trace: Traced, outcome: Outcome, layers: dict[str, Affine], node: fx.Node
) -> Affine | None:
    """The layer of a node, if it is one matrix for every position."""
    if str(node.target) not in {LINEAR, *CONVOLUTIONS}:
        return None
    layer = layers.get(parameter(trace, node.args[1]) or "")
    module: Any = None if layer is None else outcome.analysis.module(layer.module)
    if isinstance(module, nn.Linear):
        return layer
    if module is None or set(module.kernel_size) != {1} or set(module.stride) != {1}:
        return None
    padded = module.padding not in ("same", "valid") and any(module.padding)
    return None if padded else layer


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one operation that reads a result, behind what leaves it as it is."""
    while len(node.users) == 1:
        (user,) = node.users
        name = str(user.target).removeprefix("aten.").split(".")[0]
        if name not in IDENTITIES:
            return user if user.args and user.args[0] is node else None
        if name.endswith("dropout") and user.args[2:3] != (False,):
            return None
        node = user
    return None


def _observed(outcome: Outcome, node: fx.Node, layer: Affine) -> bool:
    """Whether a hook, ``keep`` or a failed trial asks for what the first layer writes."""
    analysis = outcome.analysis
    if layer.writes is None:
        return bool(analysis.taps & owners(node))
    return any(analysis.atoms.find(atom) in analysis.atoms.pins for atom in layer.writes.tolist())


@dataclass(frozen=True)
class _Size:
    """A layer as the exact rules leave it: its rows and columns, and those that are not zero."""

    rows: int
    columns: int
    written: int
    read: int
    narrows: bool
    bias: bool

    def computed(self, columns: int) -> tuple[int, int]:
        """Rows to compute, had it as many columns, and the index that scattering them stores."""
        saved = (self.rows - self.written) * columns
        if self.narrows and is_narrow(self.written, self.rows, saved):
            return self.written, self.written
        return self.rows, 0

    def stored(self, rows: int) -> int:
        """Numbers of its weight, had it as many rows, with the index of what it selects."""
        if self.narrows and is_narrow(self.read, self.columns, (self.columns - self.read) * rows):
            return rows * self.read + self.read
        return rows * self.columns


def _size(outcome: Outcome, layer: Affine) -> _Size:
    rows = layer.rows(outcome.holds)
    every = torch.ones_like(layer.foldable)
    held = every if layer.reads is None else outcome.holds(layer.reads)
    used = layer.connected[rows].any(0)
    folds = bool((~held & used & (layer.constants != 0)).any())
    read = held & used & ~layer.foldable
    written = layer.connected[:, held].any(1) & rows
    return _Size(
        int(rows.sum()),
        int(held.sum()),
        int(written.sum()),
        int(read.sum()),
        layer.axis is not None,
        layer.bias is not None or folds,
    )


def _saved(outcome: Outcome, first: Affine, second: Affine) -> int:
    """How many numbers fewer the product stores, biases and indices counted."""
    one, two = _size(outcome, first), _size(outcome, second)
    rows, index = two.computed(one.rows)
    apart = one.stored(one.rows) + one.rows * one.bias + rows * one.rows + index
    rows, index = two.computed(one.columns)
    product = one.stored(rows) + index
    return apart + two.rows * two.bias - product - two.rows * (one.bias or two.bias)


def idle_units(model: nn.Module, outcome: Outcome, given_up: dict[str, str]) -> list[Edit]:
    """Units that stay only because a layer cannot be empty: they need not read anything.

    A linear layer keeps two weights, on channels that are needed anyway, so that it can select
    them instead of reading all; selecting a single one is opaque to a later pass.
    """
    analysis = outcome.analysis
    needed = analysis.needed()
    edits: list[Edit] = []
    for layer in mergeable_layers(outcome).values():
        if layer.writes is None or layer.reads is None or layer.module in given_up:
            continue
        weight = model.get_parameter(layer.weight).detach()
        rows: list[int] = []
        columns: list[list[int]] = []
        idle = outcome.holds(layer.writes) & ~analysis.holds(needed, layer.writes)
        for row in idle.nonzero()[:, 0].tolist():
            kept = _selected(weight[row], analysis.holds(needed, layer.reads), layer)
            if int((weight[row] != 0).sum()) > len(kept):
                rows.append(row)
                columns.append(kept)
        if rows:
            edit = {"op": "thin", "module": layer.module, "rows": rows, "columns": columns}
            edits.append(edit)
    return edits


def _selected(row: Tensor, needed: Tensor, layer: Affine) -> list[int]:
    """The first two columns of a linear layer's row that read what is needed anyway."""
    if layer.axis != -1:
        return []
    columns: list[int] = ((row != 0) & needed & ~layer.foldable).nonzero()[:2, 0].tolist()
    return columns
