"""Finding attention in a model, in whatever layout it is written, and its common form.

A candidate is proposed from the traced graph: which rows of which projection are dimension d of
head h. It counts only if the common form computes the same as the module in float64, for the
module's own inputs and for random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from sapwood.minimize._trace import Inputs, Traced, owners
from sapwood.minimize.layers import Edit
from sapwood.minimize.surgery import operate

__all__ = ["Attentions", "find_attentions"]

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
_SAME = 1e-10


@dataclass(frozen=True)
class Attentions:
    """The common forms found, by module, and why other attention was left alone."""

    edits: dict[str, Edit]
    refused: dict[str, str]


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Unsuitable(Exception):
    """Why a candidate is no plain attention."""


def find_attentions(model: nn.Module, inputs: Inputs, trace: Traced) -> Attentions:
    """Looks at a plain float64 model in evaluation mode, and at its trace."""
    found = Attentions({}, {})
    packed = [p for p, m in model.named_modules() if type(m) is nn.MultiheadAttention]
    calls = _recorded(model, inputs, packed)
    for path in packed:
        module = model.get_submodule(path)
        if any(_weights_used(model, inputs, path, call) for call in calls[path]):
            found.refused[path] = "its weights are used"
            continue
        _propose(found, model, path, calls[path], partial(_packed, module))
    cores = [node for node in trace.graph.nodes if _is_core(node)]
    cores = [node for node in cores if not owners(node) & set(packed)]
    proposals = [(core, _read(model, trace, core)) for core in cores]
    paths = [p.path for _, p in proposals if isinstance(p, _Proposal)]
    calls = _recorded(model, inputs, paths)
    for core, proposal in proposals:
        if isinstance(proposal, str):
            found.refused[str(core)] = proposal
        elif paths.count(proposal.path) > 1 or proposal.path == "":
            found.refused[proposal.path] = (
                "it is written in one module with the rest of the network"
            )
        else:
            call = calls[proposal.path]
            make = partial(proposal.edit, call)
            _propose(found, model, proposal.path, call, make)
    return found


def _recorded(model: nn.Module, inputs: Inputs, paths: list[str]) -> dict[str, list[_Call]]:
    """The calls that modules receive for the example inputs."""
    calls: dict[str, list[_Call]] = {path: [] for path in paths}

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[path].append(_Call(args, kwargs, output))

        return record

    handles = [
        model.get_submodule(p).register_forward_hook(hook(p), with_kwargs=True)
        for p in dict.fromkeys(paths)
    ]
    try:
        with torch.no_grad():
            fresh = inputs.map(lambda t: t.clone())
            model(*fresh.args, **fresh.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _weights_used(model: nn.Module, inputs: Inputs, path: str, call: _Call) -> bool:
    """Whether the model's outputs change with the attention weights that a module returns."""
    if not isinstance(call.output, tuple) or call.output[1] is None:
        return False

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0], torch.full_like(output[1], math.nan)

    outputs = []
    for hook in (None, spoil):
        handle = None if hook is None else model.get_submodule(path).register_forward_hook(hook)
        try:
            with torch.no_grad():
                fresh = inputs.map(lambda t: t.clone())
                outputs.append(_pytree.tree_leaves(model(*fresh.args, **fresh.kwargs)))
        finally:
            if handle is not None:
                handle.remove()
    return any(
        isinstance(a, Tensor) and not torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for a, b in zip(*outputs, strict=True)
    )


def _propose(
    found: Attentions, model: nn.Module, path: str, calls: list[_Call], make: Callable[[], Edit]
) -> None:
    """Accepts a common form that computes the same."""
    try:
        if len(calls) != 1:
            raise _Unsuitable(f"called {len(calls)} times")
        parameters = set(model.get_submodule(path).parameters())
        others = [
            p
            for other, module in model.named_modules()
            if other != path and not other.startswith(f"{path}.")
            for p in module.parameters(recurse=False)
        ]
        if parameters & set(others):
            raise _Unsuitable("its parameters are shared")
        edit = {**make(), "module": path}
        _require_same(model.get_submodule(path), edit, calls[0])
        found.edits[path] = edit
    except _Unsuitable as reason:
        found.refused[path] = str(reason)


def _require_same(module: nn.Module, edit: Edit, call: _Call) -> None:
    """Compares on the recorded inputs and on random ones of their shapes."""
    holder = nn.Module()
    holder.add_module("m", module)
    common = operate(holder, [{**edit, "module": "m"}]).get_submodule("m")
    inputs = Inputs(call.args, call.kwargs)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 3.0):
        noise: dict[int, Tensor] = {}  # the same tensor as query and key stays the same

        def moved(t: Tensor, scale: float = scale, noise: dict[int, Tensor] = noise) -> Tensor:
            if not t.is_floating_point() or scale == 0.0:
                return t
            if id(t) not in noise:
                noise[id(t)] = torch.randn(t.shape, generator=generator, dtype=t.dtype) * scale
            return noise[id(t)]

        drawn = inputs.map(moved)
        with torch.no_grad():
            try:
                a = _first(module(*drawn.args, **drawn.kwargs))
                b = _first(common(*drawn.args, **drawn.kwargs))
            except (ValueError, RuntimeError, KeyError, IndexError) as error:
                raise _Unsuitable(f"cannot be brought to the common form: {error}") from None
        gap = (a - b).abs().max().item() if a.shape == b.shape else math.inf
        if not gap <= _SAME * max(1.0, a.abs().max().item()):
            raise _Unsuitable(f"computes more than plain attention (difference {gap:.1e})")


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        raise _Unsuitable(f"returns {type(output).__name__}")
    return tensor


def _packed(module: Any) -> Edit:
    """``nn.MultiheadAttention``."""
    if module.bias_k is not None or module.add_zero_attn:
        raise _Unsuitable("adds keys of its own (add_bias_kv or add_zero_attn)")
    width, heads = module.embed_dim, module.num_heads
    dim = width // heads
    rows = torch.arange(width).reshape(heads, dim)
    if module.in_proj_weight is not None:
        weights = ["in_proj_weight"] * 3
        blocks = [(rows + i * width).tolist() for i in range(3)]
    else:
        weights = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        blocks = [rows.tolist()] * 3
        if module.in_proj_bias is not None:
            raise _Unsuitable("has one bias for three projections")
    bias = "in_proj_bias" if module.in_proj_bias is not None else None
    return {
        "op": "canonical",
        "weights": [*weights, "out_proj.weight"],
        "biases": [*[bias] * 3, "out_proj.bias" if module.out_proj.bias is not None else None],
        "rows": blocks,
        "columns": rows.tolist(),
        "kv_of_head": list(range(heads)),
        "scale": dim**-0.5,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "call": None,
    }


@dataclass(frozen=True)
class _Proposal:
    """What the graph says about one attention."""

    path: str
    weights: list[str]
    biases: list[str | None]
    rows: list[list[list[int]]]
    columns: list[list[int]]
    scale: float
    causal: bool
    inputs: tuple[Tensor, ...]

    def edit(self, calls: list[_Call]) -> Edit:
        call = calls[0]
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
            "call": {
                "sources": _sources(call),
                "causal": self.causal,
                "outputs": _outputs(call.output),
            },
        }


def _sources(call: _Call) -> list[int | str]:
    """Where query, key and value stand: one tensor for all, or three."""
    given = [*enumerate(call.args), *call.kwargs.items()]
    tensors = [key for key, x in given if isinstance(x, Tensor)]
    if len(tensors) == 1:
        return tensors * 3
    if len(tensors) == 2:
        return [tensors[0], tensors[1], tensors[1]]
    if len(tensors) == 3:
        return tensors
    raise _Unsuitable(f"is called with {len(tensors)} tensors")


def _outputs(output: Any) -> int | None:
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and all(x is None for x in output[1:]):
        return len(output)
    raise _Unsuitable("returns more than its output")


def _is_core(node: fx.Node) -> bool:
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
    return a.shape == b.shape and a.dtype == b.dtype


def _read(model: nn.Module, trace: Traced, core: fx.Node) -> _Proposal | str:
    try:
        return _proposed(model, trace, core)
    except _Unsuitable as reason:
        return str(reason)


def _proposed(model: nn.Module, trace: Traced, core: fx.Node) -> _Proposal:
    q_end, k_end, v_end, scale, causal, transposed = _ends(core)
    linears, rows, factor = [], [], scale
    for end, swap in ((q_end, False), (k_end, transposed), (v_end, False)):
        linear, way = _behind(end, _SCALINGS)
        if not isinstance(linear, fx.Node) or str(linear.target) != "aten.linear.default":
            what = linear.name if isinstance(linear, fx.Node) else "a constant"
            raise _Unsuitable(f"its operands come from {what}, not straight from linear layers")
        factor *= _scaling(way)
        linears.append(linear)
        ids = _replayed(linear, way, end)
        rows.append(_by_head(ids.transpose(-1, -2) if swap else ids))
    heads = len({tuple(r) for r in rows[0]})
    rows = [r[:heads] for r in rows]
    out, columns = _output_columns(core, heads, len(rows[2][0]))
    names = [_parameter(trace, n.args[1]) for n in (*linears, out)]
    biases = [_parameter(trace, n.args[2]) if len(n.args) > 2 else None for n in (*linears, out)]
    path = _common_owner([*linears, out, core], names)
    prefix = f"{path}." if path else ""
    if any(not name.startswith(prefix) for name in [*names, *[b for b in biases if b]]):
        raise _Unsuitable("its projections belong to other modules")
    strip = len(prefix)
    shared = [n for n in set(names) if trace.uses[n] > 1]
    if shared:
        raise _Unsuitable(f"{shared[0]} is shared")
    return _Proposal(
        path,
        [n[strip:] for n in names],
        [b[strip:] if b else None for b in biases],
        rows,
        columns,
        factor,
        causal,
        (),
    )


def _ends(core: fx.Node) -> tuple[Any, Any, Any, float, bool, bool]:
    """Query, key and value as they enter the attention; scale, causality, transposed keys."""
    if str(core.target) == _CORE:
        arguments = {**dict(zip(("q", "k", "v", "mask", "p", "causal"), core.args, strict=False))}
        arguments.update({"mask": core.kwargs.get("attn_mask", arguments.get("mask"))})
        causal = bool(core.kwargs.get("is_causal", arguments.get("causal", False)))
        if arguments["mask"] is not None:
            raise _Unsuitable("it takes a mask")
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
        raise _Unsuitable("its attention weights are used elsewhere")
    scores, way = _behind(weights.args[0], (*_SCALINGS, *_MASKINGS))
    if not isinstance(scores, fx.Node) or str(scores.target) not in _PRODUCTS:
        raise _Unsuitable("its scores are no product of queries and keys")
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
                raise _Unsuitable("its scale is no constant")
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
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _compact(values[n]))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result = values[end]
    if not isinstance(result, Tensor):
        raise _Unsuitable("its projections are split in an unknown way")
    return result


def _compact(value: Any) -> Any:
    """In an order that every view accepts."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _by_head(ids: Tensor) -> list[list[int]]:
    """(batch, heads, tokens, d) or (batch * heads, tokens, d) -> rows of every head."""
    if ids.dim() == 4:
        ids = ids[0]
    if ids.dim() != 3 or not torch.equal(ids, ids[:, :1].expand(ids.shape)):
        raise _Unsuitable("its heads are laid out in an unknown way")
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
            raise _Unsuitable("its output is used in several ways")
        (following,) = node.users
        name = str(following.target)
        if name == "aten.linear.default":
            node = following
            break
        if name.removeprefix("aten.").split(".")[0] not in _MOVES.split():
            raise _Unsuitable(f"its output goes through {following.name}")
        args, kwargs = fx.node.map_arg(
            (following.args, following.kwargs), lambda n, v=value: _compact(v)
        )
        node, value = following, following.target(*args, **kwargs)  # type: ignore[operator]
    flat = value.reshape(-1, value.shape[-1])
    if not torch.equal(flat, flat[:1].expand(flat.shape)) or flat.shape[1] != heads * width:
        raise _Unsuitable("its output is laid out in an unknown way")
    order = flat[0].argsort().reshape(heads, width)
    return node, order.tolist()


def _parameter(trace: Traced, node: Any) -> Any:
    if node is None:
        return None
    if not isinstance(node, fx.Node) or node.name not in trace.sources:
        raise _Unsuitable("a projection's weight is computed")
    return trace.sources[node.name]


def _common_owner(nodes: list[fx.Node], names: list[str]) -> str:
    """The innermost module that all nodes were traced in."""
    common = set.intersection(*(owners(node) for node in nodes))
    return max(common, key=len) if common else ""
