"""What the traced graph says about an attention: which rows are dimension d of head h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sapwood.minimize._trace import Traced, owners
from sapwood.minimize.layers import Edit

__all__ = ["Proposal", "Unsuitable", "is_core", "read"]

_CORE = "aten.scaled_dot_product_attention.default"
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default")
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_SCALINGS = ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar")
_MASKINGS = (
    "aten.add.Tensor",
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
    "aten.where.self",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
)
_MOVES = (
    "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand flatten unflatten "
    "clone contiguous repeat_interleave to _to_copy unbind select split chunk split_with_sizes "
    "slice alias"
)


class Unsuitable(Exception):
    """Why a candidate is no plain attention."""


@dataclass(frozen=True)
class Proposal:
    """What the graph says about one attention."""

    path: str
    weights: list[str]
    biases: list[str | None]
    rows: list[list[list[int]]]
    columns: list[list[int]]
    scale: float
    causal: bool

    def edit(self, call: dict[str, Any]) -> Edit:
        """The common form, given how the module is called."""
        kv = [list(pair) for pair in zip(self.rows[1], self.rows[2], strict=True)]
        distinct = [pair for i, pair in enumerate(kv) if pair not in kv[:i]]
        return {
            "op": "canonical",
            "weights": self.weights,
            "biases": self.biases,
            "rows": [self.rows[0], [k for k, _ in distinct], [v for _, v in distinct]],
            "columns": self.columns,
            "kv_of_head": [distinct.index(pair) for pair in kv],
            "scale": self.scale,
            "batch_first": True,
            "dropout": 0.0,
            "call": {**call, "causal": self.causal},
        }


def is_core(node: fx.Node) -> bool:
    """Whether a node ends an attention: the fused operation, or softmax times values."""
    name = str(node.target)
    if name == _CORE:
        return True
    if name not in _PRODUCTS:
        return False
    weights = _behind(node.args[0], ())[0]
    return isinstance(weights, fx.Node) and str(weights.target) in _SOFTMAX


def _behind(node: Any, more: tuple[str, ...]) -> tuple[Any, list[fx.Node]]:
    """Goes back through operations that only move entries, and ``more``; also the way."""
    way: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = str(node.target)
        moves = name.removeprefix("aten.").split(".")[0] in _MOVES.split()
        if not (moves or name in more or "getitem" in name):
            break
        sources = [n for n in node.all_input_nodes if n.op == "call_function"]
        if name in _MASKINGS:
            sources = [n for n in sources if _alike(n, node)]
        if len(sources) != 1:
            break
        way.append(node)
        node = sources[0]
    return node, way


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def read(trace: Traced, core: fx.Node) -> Proposal | str:
    """The proposal, or why there is none."""
    try:
        return _proposed(trace, core)
    except Unsuitable as reason:
        return str(reason)


def _proposed(trace: Traced, core: fx.Node) -> Proposal:
    q_end, k_end, v_end, scale, causal, transposed = _ends(core)
    linears, rows, factor = [], [], scale
    for end, swap in ((q_end, False), (k_end, transposed), (v_end, False)):
        linear, way = _behind(end, _SCALINGS)
        if not isinstance(linear, fx.Node) or str(linear.target) != "aten.linear.default":
            what = linear.name if isinstance(linear, fx.Node) else "a constant"
            raise Unsuitable(f"its operands come from {what}, not straight from linear layers")
        factor *= _scaling(way)
        linears.append(linear)
        ids = _replayed(linear, way, end)
        rows.append(_by_head(ids.transpose(-1, -2) if swap else ids))
    heads = len({tuple(r) for r in rows[0]})
    rows = [r[:heads] for r in rows]
    out, columns = _output_columns(core, heads, len(rows[2][0]))
    names = [_parameter(trace, n.args[1]) for n in (*linears, out)]
    biases = [_parameter(trace, n.args[2]) if len(n.args) > 2 else None for n in (*linears, out)]
    path = _common_owner([*linears, out, core])
    prefix = f"{path}." if path else ""
    if any(not name.startswith(prefix) for name in [*names, *[b for b in biases if b]]):
        raise Unsuitable("its projections belong to other modules")
    strip = len(prefix)
    shared = [n for n in set(names) if trace.uses[n] > 1]
    if shared:
        raise Unsuitable(f"{shared[0]} is shared")
    return Proposal(
        path,
        [n[strip:] for n in names],
        [b[strip:] if b else None for b in biases],
        rows,
        columns,
        factor,
        causal,
    )


def _ends(core: fx.Node) -> tuple[Any, Any, Any, float, bool, bool]:
    """Query, key and value as they enter the attention; scale, causality, transposed keys."""
    if str(core.target) == _CORE:
        arguments = {**dict(zip(("q", "k", "v", "mask", "p", "causal"), core.args, strict=False))}
        arguments.update({"mask": core.kwargs.get("attn_mask", arguments.get("mask"))})
        causal = bool(core.kwargs.get("is_causal", arguments.get("causal", False)))
        if arguments["mask"] is not None:
            raise Unsuitable("it takes a mask")
        width = core.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        scale = core.kwargs.get("scale")
        return (
            arguments["q"],
            arguments["k"],
            arguments["v"],
            float(scale) if scale is not None else width**-0.5,  # type: ignore[arg-type]
            causal,
            False,
        )
    weights, _ = _behind(core.args[0], ())
    if len(weights.users) > 1:
        raise Unsuitable("its attention weights are used elsewhere")
    scores, way = _behind(weights.args[0], (*_SCALINGS, *_MASKINGS))
    if not isinstance(scores, fx.Node) or str(scores.target) not in _PRODUCTS:
        raise Unsuitable("its scores are no product of queries and keys")
    causal = any(str(node.target) in _MASKINGS for node in way)
    scaling = [node for node in way if str(node.target) not in _MASKINGS]
    return scores.args[0], scores.args[1], core.args[1], _scaling(scaling), causal, True


def _scaling(way: list[fx.Node]) -> float:
    factor = 1.0
    for node in way:
        name = str(node.target)
        if name in _SCALINGS:
            number = node.args[1]
            if not isinstance(number, (int, float)):
                raise Unsuitable("its scale is no constant")
            factor *= number if "mul" in name else 1.0 / number
    return factor


def _replayed(linear: fx.Node, way: list[fx.Node], end: fx.Node) -> Tensor:
    """The row numbers of a linear layer, moved as its output is."""
    shape = linear.meta["val"].shape
    ids = torch.arange(shape[-1], dtype=torch.float64).expand(shape).contiguous()
    values: dict[fx.Node, Any] = {linear: ids}
    for node in reversed(way):
        if str(node.target) in _SCALINGS:
            values[node] = values[node.all_input_nodes[0]]
            continue
        values[node] = _moved(node, values)
    result = values[end]
    if not isinstance(result, Tensor):
        raise Unsuitable("its projections are split in an unknown way")
    return result


def _moved(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """An operation on other values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _compact(values[n]))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _compact(value: Any) -> Any:
    """In an order that every view accepts."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _by_head(ids: Tensor) -> list[list[int]]:
    """(batch, heads, tokens, d) or (batch * heads, tokens, d) -> rows of every head."""
    if ids.dim() == 4:
        ids = ids[0]
    if ids.dim() != 3 or not torch.equal(ids, ids[:, :1].expand(ids.shape)):
        raise Unsuitable("its heads are laid out in an unknown way")
    return [[int(i) for i in row] for row in ids[:, 0].tolist()]


def _output_columns(core: fx.Node, heads: int, width: int) -> tuple[fx.Node, list[list[int]]]:
    """The linear layer behind the attention, and its columns for every head."""
    shape = core.meta["val"].shape
    place = torch.arange(width, dtype=torch.float64)
    head = torch.arange(shape[0] if len(shape) == 3 else shape[1], dtype=torch.float64) % heads
    ids = (head[:, None, None] * width + place).expand(shape).contiguous()
    node, value = core, ids
    while str(node.target) != "aten.linear.default":
        if len(node.users) != 1:
            raise Unsuitable("its output is used in several ways")
        (following,) = node.users
        name = str(following.target)
        if name == "aten.linear.default":
            node = following
            break
        if name.removeprefix("aten.").split(".")[0] not in _MOVES.split():
            raise Unsuitable(f"its output goes through {following.name}")
        node, value = following, _moved(following, {node: value})
    flat = value.reshape(-1, value.shape[-1])
    if not torch.equal(flat, flat[:1].expand(flat.shape)) or flat.shape[1] != heads * width:
        raise Unsuitable("its output is laid out in an unknown way")
    order = flat[0].argsort().reshape(heads, width)
    return node, order.tolist()


def _parameter(trace: Traced, node: Any) -> Any:
    if node is None:
        return None
    if not isinstance(node, fx.Node) or node.name not in trace.sources:
        raise Unsuitable("a projection's weight is computed")
    return trace.sources[node.name]


def _common_owner(nodes: list[fx.Node]) -> str:
    """The innermost module that all nodes were traced in."""
    common = set.intersection(*(owners(node) for node in nodes))
    return max(common, key=len) if common else ""
