"""Units of one layer that compute multiples of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sapwood.minimize._analysis import Outcome
from sapwood.minimize._trace import Traced
from sapwood.minimize.layers import Affine, Edit
from sapwood.minimize.merging._paths import CONVOLUTIONS, LINEAR, Reader, parameter, reach
from sapwood.minimize.merging._rows import UNIT, Multiples, Rows, multiples
from sapwood.minimize.plan import Refusal
from sapwood.minimize.surgery import add_columns

__all__ = ["mergeable_layers", "merges"]


def mergeable_layers(outcome: Outcome) -> dict[str, Affine]:
    """Weight name -> layer, for plain ``Linear`` and ``Conv`` modules with one group."""
    found: dict[str, Affine] = {}
    for layer in outcome.analysis.layers:
        if type(layer) is not Affine or layer.transposed or layer.taps is not None:
            continue
        module = outcome.analysis.module(layer.module)
        plain = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if plain and layer.weight == f"{layer.module}.weight".lstrip("."):
            found[layer.weight] = layer
    return found


def merges(
    model: nn.Module, trace: Traced, outcome: Outcome, given_up: dict[str, str]
) -> tuple[list[Edit], list[Refusal]]:
    """The merges of one sweep in the order of the network, and units that must stay apart.

    The columns of the readers are added within the sweep, so that rows which become equal by it
    are found too.
    """
    sweep = _Sweep(model, trace, outcome)
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    for node, layer in sweep.nodes():
        found = sweep.merged(node, layer)
        if found.reason is None and layer.module in given_up:
            found = _Found(found.units, [], given_up[layer.module])
        if not found.units:
            continue
        if found.reason is not None:
            reason = f"multiples of other units, but {found.reason}"
            refusals.append(Refusal(layer.module, len(found.units), reason))
            continue
        edits.append(sweep.edit(layer, found))
    return edits, refusals


@dataclass(frozen=True)
class _Found:
    """(kept, gone, factor) of one layer, who reads the units, or why they stay."""

    units: list[tuple[int, int, float]]
    readers: list[Reader]
    reason: str | None


class _Sweep:
    """The weights of a model while units are merged."""

    def __init__(self, model: nn.Module, trace: Traced, outcome: Outcome) -> None:
        self._trace, self._outcome = trace, outcome
        self._layers = mergeable_layers(outcome)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._changed: dict[str, Tensor] = {}

    def nodes(self) -> Iterator[tuple[fx.Node, Affine]]:
        """The layers whose units may be merged, in the order of the graph."""
        for node in self._trace.graph.nodes:
            if str(node.target) == LINEAR or str(node.target) in CONVOLUTIONS:
                layer = self._layers.get(parameter(self._trace, node.args[1]) or "")
                if layer is not None and layer.writes is not None:
                    yield node, layer

    def _weight(self, name: str) -> Tensor:
        return self._changed.get(name, self._parameters[name].detach())

    def merged(self, node: fx.Node, layer: Affine) -> _Found:
        """The multiples among the units that stay and are free to go."""
        candidates = self._free(layer)
        if len(candidates) < 2:
            return _Found([], [], None)
        axis = -1 if str(node.target) == LINEAR else 1
        way = reach(self._trace, node, axis, self._layers)
        if way.blocked is not None:
            way.allowed, way.labels = Multiples.EQUAL, []
        rows = self._rows(layer, candidates, way.labels)
        units = [
            (int(candidates[kept]), int(candidates[gone]), factor)
            for kept, gone, factor in multiples(rows, way.allowed)
        ]
        return _Found(units, way.readers, way.blocked)

    def _free(self, layer: Affine) -> Tensor:
        """The units that stay, though nothing but their readers holds them."""
        atoms = self._outcome.analysis.atoms
        assert layer.writes is not None
        roots = [atoms.find(atom) for atom in layer.writes.tolist()]
        shared = Counter(roots)
        free = torch.tensor([shared[r] == 1 and r not in atoms.pins for r in roots])
        return (free & self._outcome.holds(layer.writes)).nonzero()[:, 0]

    def _rows(self, layer: Affine, candidates: Tensor, labels: list[Tensor]) -> Rows:
        """What the units compute of the inputs that stay; constants that fold are in the bias."""
        weight = self._weight(layer.weight)[candidates]
        weight = weight.reshape(*weight.shape[:2], -1)  # (units, inputs, taps)
        bias = weight.new_zeros(len(candidates))
        if layer.bias is not None:
            bias = self._parameters[layer.bias].detach()[candidates]
        reads = layer.reads
        held = torch.ones_like(layer.foldable) if reads is None else self._outcome.holds(reads)
        gone = ~held & layer.foldable
        folded = gone & (layer.constants != 0)
        # What a border table takes up depends on the taps, so that they are compared themselves.
        compared = ~gone if layer.border is None else ~gone | folded
        slack = torch.zeros_like(bias)
        if layer.border is None and bool(folded.any()):
            shares = weight[:, folded] * layer.constants[folded][:, None]
            shares = shares.flatten(1)
            bias = bias + shares.sum(1)
            slack = UNIT * (shares.shape[1] + 2) * (shares.abs().sum(1) + bias.abs())
        stacked = torch.stack(labels, 1) if labels else weight.new_zeros(len(layer.connected), 0)
        return Rows(weight[:, compared].flatten(1), bias, slack, stacked[candidates])

    def edit(self, layer: Affine, found: _Found) -> Edit:
        """The merge as a step of surgery; the readers' weights change here too."""
        kept, gone, factors = (list(column) for column in zip(*found.units, strict=True))
        readers = []
        for reader in found.readers:
            into, source = (reader.columns[index].flatten() for index in (kept, gone))
            scale = torch.tensor(factors, dtype=torch.float64)
            scale = scale.repeat_interleave(reader.columns.shape[1])
            name = reader.layer.weight
            self._changed[name] = add_columns(self._weight(name), into, source, scale)
            readers.append(
                {
                    "module": reader.layer.module,
                    "from": source.tolist(),
                    "into": into.tolist(),
                    "factors": scale.tolist(),
                }
            )
        units = [[g, k, f] for k, g, f in found.units]
        return {"op": "merge", "module": layer.module, "units": units, "readers": readers}
