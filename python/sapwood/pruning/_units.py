"""Which units a network has: who writes each channel and who reads it, observed in one forward.

Every value carries the identities of its units, an integer tensor of its own shape. Operations that
move values about (reshape, transpose, chunk, cat, ...) are applied to the identities as they are;
operations that combine values at the same place (add, mul) join the identities that meet; in
attention the units of queries and keys are noted as pairs, by head; layers with weights read the
identities of their input and give their output new ones.
An operation that is not known ends the trace of what goes through it, and its units count as
neither written nor read by more than was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sapwood.pruning._unit_ids import (
    UNKNOWN,
    distinct,
    everywhere,
    mapped,
    mean_square,
    plain_name,
    roots,
    tensors_in,
    varying,
)

__all__ = ["Layer", "Observation", "observe"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WEIGHTED = _words("linear conv1d conv2d conv3d")
_MOVING = _words(
    "reshape view flatten unflatten permute transpose movedim swapaxes unsqueeze squeeze expand "
    "expand_as repeat repeat_interleave chunk split unbind getitem select narrow roll flip t "
    "index_select pixel_shuffle pixel_unshuffle channel_shuffle"
)
_JOINING = _words("add sub mul div truediv addcmul maximum minimum where lerp")
_SAME_PLACE = _words(
    "relu relu6 gelu silu mish elu selu celu leaky_relu prelu sigmoid tanh softplus hardswish "
    "hardsigmoid hardtanh clamp clip abs square sqrt rsqrt exp log pow neg dropout dropout1d "
    "dropout2d alpha_dropout batch_norm layer_norm group_norm instance_norm rms_norm normalize "
    "contiguous clone detach to float double half bfloat16 type_as requires_grad"
)
#: The channel axis stays where it is, the sizes behind it change.
_SPATIAL = _words(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d interpolate"
)
_REDUCING = _words("mean sum amax amin")


@dataclass(frozen=True)
class Layer:
    """One use of a weight: the units it reads and writes, -1 where that is not known.

    ``rows`` are those of the parameter that this use concerns. ``square`` is the mean over batch
    and places of the squared input, per input channel.
    """

    name: str
    rows: slice
    reads: Tensor  # (groups * in per group,) int64
    writes: Tensor  # (out,) int64
    groups: int
    square: Tensor  # as reads
    diagonal: bool = False  # a factor per channel: reads, writes and weight have one length


@dataclass
class Observation:
    """What one forward showed: the uses of the weights, and how many units there are.

    Each attention has an entry in ``scores``, the units of queries and of keys that are multiplied,
    and in ``values``, those that are averaged, all (heads, dimensions).
    """

    layers: list[Layer] = field(default_factory=list)
    units: int = 0
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def observe(model: nn.Module, inputs: Tensor, weights: Mapping[str, nn.Parameter]) -> Observation:
    """Runs a model and notes what its weights read and write.

    Two rows show how the units are connected, all of them how large the activations are.

    Args:
        model: in the mode in which it is to be observed.
        inputs: (rows, ...), its argument.
        weights: name -> parameter of linear and convolutional layers, or factors per channel.

    Returns:
        The uses, in the order in which they ran.
    """
    connections, sizes = _Observer(weights, trace=True), _Observer(weights, trace=False)
    with torch.no_grad():
        few = inputs[:2]
        connections.name_input(few)
        with connections:
            output = model(few)
        with sizes:
            model(inputs)
    return connections.result(output, [layer.square for layer in sizes.layers])


class _Observer(TorchFunctionMode):
    def __init__(self, weights: Mapping[str, nn.Parameter], *, trace: bool) -> None:
        super().__init__()
        self._trace = trace
        self._names = {id(parameter): name for name, parameter in weights.items()}
        self._held: list[Tensor] = []  # so that no id is used twice
        self._ids: dict[int, Tensor] = {}
        self._pairs: list[Tensor] = []
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._values: list[Tensor] = []
        self.layers: list[Layer] = []
        self._units = 0

    def name_input(self, x: Tensor) -> None:
        """Gives every channel of an input, its axis 1 or only axis behind the batch, a unit."""
        if x.dim() >= 2:
            axis = 1 if x.dim() != 3 else 2
            self._tag(x, self._along(self._fresh(x.shape[axis]), x, axis))

    def result(self, output: Any, squares: list[Tensor]) -> Observation:
        """What was seen, with squared activations from another run of the same layers."""
        joined = roots(self._units, self._pairs)
        found = Observation(units=self._units)
        for layer, square in zip(self.layers, squares, strict=True):
            reads, writes = (mapped(ids, joined) for ids in (layer.reads, layer.writes))
            reads = torch.where(reads[0] == reads[1], reads[0], UNKNOWN)
            found.layers.append(replace(layer, reads=reads, writes=writes, square=square))
        found.scores = [(mapped(q, joined), mapped(k, joined)) for q, k in self._scores]
        found.values = [mapped(ids, joined) for ids in self._values]
        ids = [self._ids[id(x)].flatten() for x in tensors_in(output) if id(x) in self._ids]
        if ids:
            found.outputs = mapped(torch.cat(ids).unique(), joined)
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = plain_name(func)
        if name == "multi_head_attention_forward":
            return self._attention_module(func, args, kwargs)
        result = func(*args, **kwargs)
        if name in _WEIGHTED:
            self._weighted(name, result, args, kwargs)
        elif name in _MOVING and isinstance(args[0], Tensor):
            self._moved(func, result, args, kwargs)
        elif name in ("cat", "concat", "stack"):
            self._joined_up(func, result, args, kwargs)
        elif name in _JOINING:
            self._combined(result, args)
        elif name in _SAME_PLACE:
            self._keep(result, args, kwargs)
        elif name in _SPATIAL:
            self._pooled(result, args, kwargs)
        elif name in _REDUCING:
            self._reduced(result, args, kwargs)
        elif name == "scaled_dot_product_attention":
            self._attended(result, args, kwargs)
        elif name in ("matmul", "bmm"):
            self._multiplied(result, args)
        elif name == "index_add":
            self._index_added(result, args)
        elif name == "embedding":
            self._tag(result, self._along(self._fresh(result.shape[-1]), result, -1))
        return result

    def _fresh(self, count: int) -> Tensor:
        first, self._units = self._units, self._units + count
        return torch.arange(first, self._units)

    def _tag(self, x: Any, ids: Tensor) -> None:
        known = isinstance(x, Tensor) and ids.shape == x.shape
        if self._trace and known and bool((distinct(ids)[0] != UNKNOWN).any()):
            self._held.append(x)
            self._ids[id(x)] = ids

    def _of(self, x: Any) -> Tensor | None:
        return self._ids.get(id(x)) if isinstance(x, Tensor) else None

    @staticmethod
    def _along(units: Tensor, like: Tensor, axis: int) -> Tensor:
        shape = [1] * like.dim()
        shape[axis] = -1
        return units.view(shape).expand(like.shape)

    def _join(self, a: Tensor, b: Tensor) -> None:
        """Units that meet at one place are one."""
        a, b = distinct(a, b)
        pairs = torch.stack((a.reshape(-1), b.reshape(-1)), 1)
        pairs = pairs[(pairs != UNKNOWN).all(1) & (pairs[:, 0] != pairs[:, 1])]
        if len(pairs):
            self._pairs.append(pairs.unique(dim=0))

    def _weighted(self, name: str, result: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        groups = 1
        axis = -1
        if name != "linear":
            axis = 1 - weight.dim()
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        writes = self._fresh(weight.shape[0])
        self._tag(result, self._along(writes, result, axis))
        if id(weight) in self._names:
            self._note(weight, slice(None), x, axis, writes, groups)

    def _note(
        self, weight: Tensor, rows: slice, x: Tensor, axis: int, writes: Tensor, groups: int = 1
    ) -> None:
        square = mean_square(x, axis)
        reads = self._channels(x, axis)
        name = self._names[id(weight)]
        self.layers.append(Layer(name, rows, reads, writes, groups, square))

    def _channels(self, x: Tensor, axis: int) -> Tensor:
        """(2, C) the lowest and the highest unit along one axis, over all places.

        Places where nothing is known, such as that of a class token, do not count.
        """
        ids = self._of(x)
        if ids is None:
            return torch.full((2, x.shape[axis]), UNKNOWN)
        rows = ids.movedim(axis, -1).flatten(0, -2)
        highest = rows.amax(0)
        lowest = torch.where(rows == UNKNOWN, highest, rows).amin(0)
        return torch.stack((lowest, highest))

    def _moved(
        self, func: Callable[..., Any], result: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        ids = self._of(args[0])
        if ids is None:
            return
        moved = func(ids, *args[1:], **kwargs)
        for x, part in zip(tensors_in(result), tensors_in(moved), strict=True):
            self._tag(x, part)

    def _joined_up(
        self, func: Callable[..., Any], result: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        parts = args[0] if args else kwargs["tensors"]
        ids = [self._of(x) for x in parts]
        filled = [
            torch.full(x.shape, UNKNOWN) if part is None else part
            for x, part in zip(parts, ids, strict=True)
        ]
        rest = {key: value for key, value in kwargs.items() if key != "tensors"}
        self._tag(result, func(filled, *args[1:], **rest))

    def _combined(self, result: Tensor, args: Any) -> None:
        factor = next((x for x in args if id(x) in self._names), None)
        others = [x for x in args if isinstance(x, Tensor) and x is not factor]
        known = [everywhere(ids) for x in others if (ids := self._of(x)) is not None]
        for ids in known[1:]:
            if varying(ids) == varying(known[0]):  # channels are not joined with tokens
                self._join(known[0].expand(result.shape), ids.expand(result.shape))
        if factor is not None and others and factor.numel() == max(factor.shape, default=1):
            self._scaled(result, others[0], factor)
        elif known:
            self._tag(result, known[0].expand(result.shape))

    def _scaled(self, result: Tensor, x: Tensor, factor: Tensor) -> None:
        """A factor per channel, such as that of a layer scale."""
        longest = max(range(factor.dim()), key=lambda dim: factor.shape[dim])
        axis = longest - factor.dim()
        writes = self._fresh(factor.numel())
        square = mean_square(x, axis)
        reads, name = self._channels(x, axis), self._names[id(factor)]
        self.layers.append(Layer(name, slice(None), reads, writes, 1, square, diagonal=True))
        self._tag(result, self._along(writes, result, axis))

    def _keep(self, result: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = self._of(args[0] if args else kwargs.get("input"))
        if ids is not None:
            self._tag(result, ids)

    def _pooled(self, result: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        ids = self._of(x)
        y = result[0] if isinstance(result, tuple) else result
        if ids is not None and y.shape[:2] == x.shape[:2]:
            corner = ids[(slice(None), slice(None), *[slice(0, 1)] * (x.dim() - 2))]
            self._tag(y, corner.expand(y.shape))

    def _reduced(self, result: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = self._of(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        if ids is None or dims is None:
            return
        low, high = ids.amin(dims, keep), ids.amax(dims, keep)
        self._tag(result, torch.where(low == high, low, UNKNOWN))

    def _attended(self, result: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        q, k, v = (self._of(x) for x in args[:3])
        if q is not None and k is not None and q.shape[:-2] == k.shape[:-2]:
            queries, keys = _heads(q[..., 0, :], k[..., 0, :])
            self._scores.append((queries, keys))
        if v is not None and v.shape[:-2] == result.shape[:-2]:
            self._values += _heads(v[..., 0, :])
            self._tag(result, v[..., :1, :].expand(result.shape))

    def _multiplied(self, result: Tensor, args: Any) -> None:
        """Attention by hand: scores meet along their inner axis, weights times values keep V's."""
        left, right = self._of(args[0]), self._of(args[1])
        if left is not None and right is not None:
            if left.shape[:-2] == right.shape[:-2]:
                queries, keys = _heads(left[..., 0, :], right[..., :, 0])
                self._scores.append((queries, keys))
        elif right is not None and right.shape[:-2] == result.shape[:-2]:
            self._values += _heads(right[..., 0, :])
            self._tag(result, right[..., :1, :].expand(result.shape))

    def _index_added(self, result: Tensor, args: Any) -> None:
        stream, dim, index, branch = args[:4]
        ids, added, places = self._of(stream), self._of(branch), index.cpu().long()
        if ids is not None and added is not None:
            self._join(ids.index_select(dim, places), added)
        elif ids is None and added is not None:  # zeros or a bias, which nothing else writes
            fresh = self._along(self._fresh(stream.shape[dim]), stream, dim)
            ids = fresh.index_copy(dim, places, added)
        if ids is not None:
            self._tag(result, ids)

    def _attention_module(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``nn.MultiheadAttention``: the projections as layers of their own."""
        query, key, value, _, heads, packed, *rest = args
        out_weight, out_bias = rest[5], rest[6]
        plain = kwargs.get("use_separate_proj_weight", False) or out_weight is None
        if plain or rest[1] is not None or rest[3]:  # bias_k, add_zero_attn
            return func(*args, **kwargs)
        identity = torch.eye(out_weight.shape[1], dtype=out_weight.dtype, device=out_weight.device)
        attended, weights = func(*args[:11], identity, None, *args[13:], **kwargs)
        width = query.shape[-1]
        q, k, v = (self._fresh(width) for _ in range(3))
        self._scores.append((q.view(heads, -1), k.view(heads, -1)))
        self._values.append(v.view(heads, -1))
        if id(packed) in self._names:
            for part, (x, writes) in enumerate(((query, q), (key, k), (value, v))):
                rows = slice(part * width, (part + 1) * width)
                self._note(packed, rows, x, -1, writes)
        self._tag(attended, self._along(v, attended, -1))
        output = F.linear(attended, out_weight, out_bias)
        self._weighted("linear", output, (attended, out_weight), {})
        return output, weights


def _heads(*ids: Tensor) -> list[Tensor]:
    """(heads, dimensions) the units of tensors (..., heads, dimensions) that belong together."""
    rows: Tensor = torch.cat(ids, -1).flatten(0, -2).unique(dim=0)
    return list(torch.split(rows, [part.shape[-1] for part in ids], -1))
