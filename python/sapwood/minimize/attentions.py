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
from torch import Tensor, nn
from torch.utils import _pytree

from sapwood.minimize._attention_graph import Proposal, Unsuitable, is_core, read
from sapwood.minimize._trace import Inputs, Traced, owners
from sapwood.minimize.layers import Edit
from sapwood.minimize.surgery import operate

__all__ = ["Attentions", "find_attentions"]

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
    cores = [node for node in trace.graph.nodes if is_core(node)]
    cores = [node for node in cores if not owners(node) & set(packed)]
    proposals = [(core, read(trace, core)) for core in cores]
    paths = [p.path for _, p in proposals if isinstance(p, Proposal)]
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
            make = partial(_hand_written, proposal, call)
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
            raise Unsuitable(f"called {len(calls)} times")
        parameters = set(model.get_submodule(path).parameters())
        others = [
            p
            for other, module in model.named_modules()
            if other != path and not other.startswith(f"{path}.")
            for p in module.parameters(recurse=False)
        ]
        if parameters & set(others):
            raise Unsuitable("its parameters are shared")
        edit = {**make(), "module": path}
        _require_same(model.get_submodule(path), edit, calls[0])
        found.edits[path] = edit
    except Unsuitable as reason:
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
                raise Unsuitable(f"cannot be brought to the common form: {error}") from None
        gap = (a - b).abs().max().item() if a.shape == b.shape else math.inf
        if not gap <= _SAME * max(1.0, a.abs().max().item()):
            raise Unsuitable(f"computes more than plain attention (difference {gap:.1e})")


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        raise Unsuitable(f"returns {type(output).__name__}")
    return tensor


def _packed(module: Any) -> Edit:
    """``nn.MultiheadAttention``."""
    if module.bias_k is not None or module.add_zero_attn:
        raise Unsuitable("adds keys of its own (add_bias_kv or add_zero_attn)")
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
            raise Unsuitable("has one bias for three projections")
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


def _hand_written(proposal: Proposal, calls: list[_Call]) -> Edit:
    call = calls[0]
    return proposal.edit({"sources": _sources(call), "outputs": _outputs(call.output)})


def _sources(call: _Call) -> list[int | str]:
    """Where query, key and value stand: one tensor for all, or three."""
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    tensors = [key for key, x in given if isinstance(x, Tensor)]
    if len(tensors) == 1:
        return tensors * 3
    if len(tensors) == 2:
        return [tensors[0], tensors[1], tensors[1]]
    if len(tensors) == 3:
        return tensors
    raise Unsuitable(f"is called with {len(tensors)} tensors")


def _outputs(output: Any) -> int | None:
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and all(x is None for x in output[1:]):
        return len(output)
    raise Unsuitable("returns more than its output")
