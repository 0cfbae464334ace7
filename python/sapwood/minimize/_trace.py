"""Tracing through torch.export: the operations of a model, with its parameters by name."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from sapwood.minimize._leaves import LEAF_OPERATION, LEAVES, leaf_sites, site_of
from sapwood.minimize._masks import ordinary
from sapwood.minimize.errors import MinimizeError

__all__ = ["Inputs", "Outline", "Traced", "owner", "owners", "traced"]

#: Layers whose weights the analysis sees in the graph only, never through the module.
_LARGE: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.Linear,
)


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """A tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example), {})
        return cls((example,), {})

    def map(self, function: Any) -> Inputs:
        """The same arguments with every tensor replaced."""
        args, kwargs = _pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def tensors(self) -> list[Tensor]:
        return [t for t in _pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Traced:
    """A functional graph of ATen operations.

    ``sources`` names the parameter or buffer behind a placeholder, under its first name if it is
    tied; ``values`` holds what every placeholder stands for; ``uses`` counts who reads a parameter;
    ``inputs`` are the placeholders of the call's arguments, in order.
    """

    graph: fx.Graph
    sources: dict[str, str]
    values: Mapping[str, Any]
    uses: Counter[str]
    inputs: tuple[str, ...]


class Outline:
    """A plain model in float64 on the CPU that has its large weights in shape only.

    That is all that tracing asks for; the analysis then looks at one weight after the other, so
    that the whole model in float64 never exists meanwhile. Memory is reserved for the weights but
    not touched before ``fill``.

    Args:
        plain: a copy of the model, which is changed; the numbers that it uses are not.
    """

    def __init__(self, plain: nn.Module) -> None:
        self.model = plain
        self._given: dict[nn.Parameter, Tensor] = {}
        leaves = [module for module in plain.modules() if type(module) in LEAVES]
        inside = {part for leaf in leaves for part in leaf.modules()}  # their rules read them
        for module in plain.modules():
            if type(module) in _LARGE and module not in inside:
                self._empty(module.weight)
        plain.cpu().double().requires_grad_(True)

    def _empty(self, weight: Any) -> None:
        if not isinstance(weight, nn.Parameter) or weight in self._given:
            return  # computed by a parametrization, or tied
        if ordinary(weight) and weight.is_floating_point():
            self._given[weight] = weight.data
            weight.data = torch.empty_like(weight, dtype=torch.float64, device="cpu")

    def fill(self) -> None:
        """Gives the weights their values, for code that runs modules."""
        for weight, values in self._given.items():
            weight.data.copy_(values)
        self._given.clear()

    def lazily(self, trace: Traced) -> Traced:
        """The trace with weights that are read, and widened, where they are first used.

        In the model they are empty from now on, so that nobody takes memory for numbers.
        """
        given = {
            name: self._given[parameter]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter in self._given
        }
        for weight in self._given:
            weight.data = weight.new_empty(0)
        late = {node: given[name] for node, name in trace.sources.items() if name in given}
        waiting = set(late)
        for user in list(trace.graph.nodes):
            for node in user.all_input_nodes:
                if node.name in waiting:
                    user.prepend(node)
                    waiting.remove(node.name)
        return replace(trace, values=_Widening(trace.values, late))

    def clear(self) -> None:
        """Frees the parameters, also where a trace holds them that nobody has collected yet."""
        self._given.clear()
        for parameter in self.model.parameters():
            parameter.data = parameter.new_empty(0)


class _Widening(Mapping[str, Any]):
    """Values of placeholders, some of which become float64 tensors each time they are asked for."""

    def __init__(self, values: Mapping[str, Any], late: Mapping[str, Tensor]) -> None:
        self._values, self._late = values, late

    def __getitem__(self, name: str) -> Any:
        return self._late[name].cpu().double() if name in self._late else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@contextmanager
def traced(model: nn.Module, inputs: Inputs) -> Iterator[Traced]:
    """Traces a float64 copy of a model; the leaves of the graph live in the block.

    Raises:
        MinimizeError: if torch.export cannot follow the model; the text names the operation.
    """
    canonical: dict[int, str] = {}
    for name, tensor in _named_tensors(model):
        canonical.setdefault(id(tensor), name)
    first = {name: canonical[id(tensor)] for name, tensor in _named_tensors(model)}
    with leaf_sites(model) as surface, torch.enable_grad():
        program = _export(surface, inputs)
        for node in program.graph.nodes:
            if str(node.target) == LEAF_OPERATION:
                site_of(node.args[1]).uses += 1
        yield _read(program, first, inputs)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    return parameters + list(model.named_buffers(remove_duplicate=False))


def _export(model: nn.Module, inputs: Inputs) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own notes on its internals
            program = torch.export.export(model, inputs.args, inputs.kwargs or None, strict=False)
            return program.run_decompositions({})
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise MinimizeError(
            "sapwood.minimize: model must be traceable by torch.export, "
            f"got {type(error).__name__}: {reason}"
        ) from error


def _read(program: Any, first: Mapping[str, str], inputs: Inputs) -> Traced:
    signature, graph = program.graph_signature, program.graph
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    state = {**program.state_dict, **program.constants}
    for table in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for placeholder, name in table.items():
            sources[placeholder] = first.get(name, name)
            values[placeholder] = state[name]
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        values[placeholder] = state[name]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    user = [node.name for node in placeholders if node.name not in values]
    given = _pytree.tree_leaves((inputs.args, inputs.kwargs))
    values.update(zip(user, given, strict=True))
    uses: Counter[str] = Counter()
    for node in placeholders:
        if node.name in sources:
            uses[sources[node.name]] += len(node.users)
    return Traced(graph, sources, values, uses, tuple(user))


def owner(node: fx.Node) -> str:
    """The path of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1].split("@")[0] if paths else ""


def owners(node: fx.Node) -> set[str]:
    """The paths of all modules around a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return {path.split("@")[0] for path, _ in stack.values()}
