"""How the units of a layer reach the layers that read them, through the traced graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from sapwood.minimize._trace import Traced, owner
from sapwood.minimize.layers import Affine
from sapwood.minimize.merging._rows import Multiples

__all__ = ["CONVOLUTIONS", "IDENTITIES", "LINEAR", "Reach", "Reader", "parameter", "reach"]

LINEAR = "aten.linear.default"
CONVOLUTIONS = {f"aten.conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")}

#: What leaves every entry as it is, in evaluation.
IDENTITIES = {"alias", "clone", "contiguous", "dropout", "feature_dropout", "alpha_dropout"}
_PROPORTIONAL = IDENTITIES | {"detach", "neg", "lift_fresh_copy"}
_HOMOGENEOUS = {"relu", "leaky_relu", "abs"}
#: Functions of one entry, or of entries at one place and numbers.
_ENTRYWISE = """
relu6 gelu silu tanh sigmoid hardswish hardsigmoid hardtanh elu celu selu softplus mish exp expm1
sqrt rsqrt square reciprocal log log1p erf sin cos logsigmoid log_sigmoid softshrink hardshrink
softsign sign floor ceil round to _to_copy add sub rsub mul div maximum minimum pow clamp clamp_min
clamp_max threshold
"""
_MOVING = "view _unsafe_view reshape permute transpose t unsqueeze squeeze flatten unflatten"
_AVERAGES = {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_", "_adaptive_") for n in (1, 2, 3)}
_MAXIMA = {
    f"{kind}max_pool{n}d{end}"
    for kind in ("", "adaptive_")
    for n in (1, 2, 3)
    for end in ("", "_with_indices")
}
_BY_CHANNEL = _AVERAGES | _MAXIMA | {"pad", "constant_pad_nd", "mean"}
_SINGLE = _PROPORTIONAL | _HOMOGENEOUS | set(_ENTRYWISE.split())
_BATCH_NORM = "_native_batch_norm_legit_no_training"


@dataclass(frozen=True)
class Reader:
    """A layer that reads the units: ``columns`` holds which of its inputs belong to each."""

    layer: Affine
    columns: Tensor  # (units, k) int64, the same k positions in the same order for every unit


@dataclass
class Reach:
    """Who reads the units of a layer, and what of a multiple is left on the way.

    ``blocked`` names what reads them in another way.
    """

    readers: list[Reader] = field(default_factory=list)
    allowed: Multiples = Multiples.ANY
    labels: list[Tensor] = field(default_factory=list)  # (units,) each, equal for equal units
    blocked: str | None = None


@dataclass(frozen=True)
class _Layout:
    """Where the units are in a tensor: along ``axis`` in order, or as ``places`` tells.

    ``places`` (of the tensor's shape) numbers the entries of an earlier tensor with ``stride``
    entries from one unit to the next.
    """

    shape: tuple[int, ...]
    axis: int | None
    places: Tensor | None = None
    stride: int = 1


class _Blocked(Exception):
    """The units are read by something that cannot read another unit in their place."""


def reach(trace: Traced, start: fx.Node, axis: int, layers: dict[str, Affine]) -> Reach:
    """Follows the output of a layer to its readers.

    Args:
        trace: the traced model.
        start: the layer's node.
        axis: of the units in its output.
        layers: the layers that may read, by the names of their weights.
    """
    walk = _Walk(trace, layers, _shape(start)[axis])
    walk.layouts[start] = _Layout(_shape(start), axis % len(_shape(start)))
    node = start.next
    try:
        while node.op != "root":
            if any(source in walk.layouts for source in node.all_input_nodes):
                walk.follow(node)
            node = node.next
    except _Blocked as reason:
        walk.found.blocked = str(reason)
    return walk.found


def parameter(trace: Traced, node: Any) -> str | None:
    """The name of the parameter that an argument is."""
    return trace.sources.get(node.name) if isinstance(node, fx.Node) else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


class _Walk:
    """One pass over the nodes behind a layer."""

    def __init__(self, trace: Traced, layers: dict[str, Affine], units: int) -> None:
        self._trace, self._layers, self._units = trace, layers, units
        self.layouts: dict[fx.Node, _Layout] = {}
        self.found = Reach()

    def follow(self, node: fx.Node) -> None:
        """Adds a reader, or the layout of the node's result.

        Raises:
            _Blocked: if the node does neither.
        """
        name, target = _name(node), str(node.target)
        if node.op != "call_function":
            raise _Blocked("they are an output of the model")
        if name == "_assert_tensor_metadata":
            return
        if node.target is operator.getitem:
            source: Any = node.args[0]
            if node.args[1] != 0:
                raise self._refused(node)
            self.layouts[node] = self.layouts[source]
        elif target == LINEAR or target in CONVOLUTIONS:
            self._read(node, -1 if target == LINEAR else 1)
        elif name in _MOVING.split():
            self._move(node)
        elif name in _BY_CHANNEL:
            self._pool(node, name)
        elif name == "prelu" or name == _BATCH_NORM:
            self._parametric(node, name)
        else:
            self._entrywise(node, name)

    def _refused(self, node: fx.Node) -> _Blocked:
        place = f" in {owner(node)}" if owner(node) else ""
        name = "sapwood's own module" if "sapwood" in str(node.target) else _name(node)
        return _Blocked(f"{name}{place} reads them too")

    def _allow(self, allowed: Multiples) -> None:
        self.found.allowed = min(self.found.allowed, allowed)

    def _only(self, node: fx.Node) -> _Layout:
        """The layout of the first argument, which must be the only one with units."""
        source, *others = node.args
        nodes = [n for n in node.all_input_nodes if n is not source]
        if source not in self.layouts or any(n in self.layouts for n in nodes):
            raise self._refused(node)
        if any(other is source for other in others):
            raise self._refused(node)
        layout: _Layout = self.layouts[source]  # type: ignore[index]
        return layout

    def _read(self, node: fx.Node, axis: int) -> None:
        layout = self._only(node)
        layer = self._layers.get(parameter(self._trace, node.args[1]) or "")
        columns = None if layer is None else self._columns(layout, axis % len(layout.shape))
        if layer is None or columns is None:
            raise self._refused(node)
        self.found.readers.append(Reader(layer, columns))

    def _columns(self, layout: _Layout, axis: int) -> Tensor | None:
        """(units, k): the places along an axis that belong to each unit."""
        if layout.places is None:
            return torch.arange(self._units)[:, None] if layout.axis == axis else None
        places = layout.places.movedim(axis, -1).flatten(0, -2)
        unit, rest = self._decoded(places, layout.stride)
        if places.shape[1] % self._units or bool((unit != unit[:1]).any()):
            return None
        order = rest[0].argsort(stable=True)
        order = order[unit[0][order].argsort(stable=True)].reshape(self._units, -1)
        own = unit[0][order] == torch.arange(self._units)[:, None]
        same = rest[:, order] == rest[:, order[:1]]
        return order if bool(own.all()) and bool(same.all()) else None

    def _decoded(self, places: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """The unit of every entry, and what else tells where the entry came from."""
        unit = (places // stride) % self._units
        return unit, places - unit * stride

    def _move(self, node: fx.Node) -> None:
        layout = self._only(node)
        places, stride = layout.places, layout.stride
        if places is None:
            assert layout.axis is not None
            places = torch.arange(prod(layout.shape)).reshape(layout.shape)
            stride = prod(layout.shape[layout.axis + 1 :])
        target: Any = node.target
        moved = target(places, *node.args[1:], **node.kwargs)
        self.layouts[node] = self._ordered(moved, stride)

    def _ordered(self, places: Tensor, stride: int) -> _Layout:
        """The layout, by an axis where the units are in order along one."""
        unit, rest = self._decoded(places, stride)
        numbers = torch.arange(self._units)
        for axis, size in enumerate(places.shape):
            if size != self._units:
                continue
            along = numbers.reshape([-1 if a == axis else 1 for a in range(places.dim())])
            if bool((unit == along).all()) and bool((rest == rest.narrow(axis, 0, 1)).all()):
                return _Layout(tuple(places.shape), axis)
        return _Layout(tuple(places.shape), None, places.clone(), stride)

    def _pool(self, node: fx.Node, name: str) -> None:
        """Operations on the positions of each channel: pooling, padding, averaging."""
        layout = self._only(node)
        axis, ndim = layout.axis, len(layout.shape)
        if axis is None:
            raise self._refused(node)
        if name == "mean":
            axis = self._behind_mean(node, layout, axis)
        elif name.endswith(("pad", "pad_nd")):
            amounts: Any = node.args[1]
            if axis in [ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount]:
                raise self._refused(node)
            place = 3 if name == "pad" else 2
            value = node.args[place] if len(node.args) > place else node.kwargs.get("value")
            if value not in (None, 0):
                self._allow(Multiples.EQUAL)
        elif axis != 1 or ndim != 2 + int(next(c for c in name if c.isdigit())):
            raise self._refused(node)
        if name in _MAXIMA:
            self._allow(Multiples.POSITIVE)
        self.layouts[node] = _Layout(_shape(node), axis)

    def _behind_mean(self, node: fx.Node, layout: _Layout, axis: int) -> int:
        ndim = len(layout.shape)
        asked: Any = node.args[1] if len(node.args) > 1 else None
        dims = sorted(d % ndim for d in ([asked] if isinstance(asked, int) else asked or ()))
        if not dims or axis in dims:
            raise self._refused(node)
        kept = len(_shape(node)) == ndim
        return axis if kept else axis - sum(d < axis for d in dims)

    def _parametric(self, node: fx.Node, name: str) -> None:
        """One set of parameters per channel: equal for units that are equal."""
        layout = self._only(node)
        parameters = node.args[1:2] if name == "prelu" else node.args[1:5]
        for node_of in parameters:
            if node_of is None:
                continue
            source = parameter(self._trace, node_of)
            if source is None or self._trace.uses[source] > 1 or not isinstance(node_of, fx.Node):
                raise self._refused(node)
            values = self._trace.values[node_of.name].detach().double()
            if values.numel() == 1:
                continue
            if layout.axis != 1 or len(values) != self._units:
                raise self._refused(node)
            self.found.labels.append(values)
        self._allow(Multiples.POSITIVE if name == "prelu" else Multiples.EQUAL)
        self.layouts[node] = _Layout(_shape(node), layout.axis, layout.places, layout.stride)

    def _entrywise(self, node: fx.Node, name: str) -> None:
        if name not in _SINGLE or self._trains(node, name):
            raise self._refused(node)
        inputs = [self.layouts[n] for n in node.all_input_nodes if n in self.layouts]
        others = [n for n in node.all_input_nodes if n not in self.layouts]
        if any(prod(_shape(n)) != 1 for n in others) or _shape(node) != inputs[0].shape:
            raise self._refused(node)
        if not all(_same(inputs[0], layout) for layout in inputs[1:]):
            raise self._refused(node)
        self._allow(_homogeneity(node, name))
        self.layouts[node] = inputs[0]

    def _trains(self, node: fx.Node, name: str) -> bool:
        return name.endswith("dropout") and bool(node.args[2] if len(node.args) > 2 else True)


def _homogeneity(node: fx.Node, name: str) -> Multiples:
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    scaled = isinstance(node.args[0], fx.Node) and len(node.args) == 2 and len(numbers) == 1
    if name in _PROPORTIONAL or (name in ("mul", "div") and scaled and not node.kwargs):
        return Multiples.ANY
    if name in _HOMOGENEOUS:
        return Multiples.POSITIVE
    if name == "_to_copy" and node.kwargs.get("dtype") in (None, torch.float64):
        return Multiples.ANY
    return Multiples.EQUAL


def _same(one: _Layout, other: _Layout) -> bool:
    if one.places is None or other.places is None:
        return (one.shape, one.axis) == (other.shape, other.axis) and one.places is other.places
    return one.stride == other.stride and torch.equal(one.places, other.places)
