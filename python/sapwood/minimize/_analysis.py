"""The analysis: which channels hold constants, which are read, and which may go."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from sapwood.minimize._atoms import Atoms
from sapwood.minimize._facts import CONSTANT, LIVE, Bounds, Facts, demote, no_facts
from sapwood.minimize._leaves import behind
from sapwood.minimize._promises import Promises, channel_axis
from sapwood.minimize._tails import FEATURE, Tail
from sapwood.minimize._trace import Inputs, Traced, owners, traced
from sapwood.minimize.layers import Edit, Layer, cut, indices
from sapwood.minimize.plan import ChannelGroup, Refusal
from sapwood.minimize.rules import RULES, Step, bounded, map_facts, opaque, tensors_in

__all__ = [
    "INPUT",
    "OUTPUT",
    "Analysis",
    "Balance",
    "Options",
    "Outcome",
    "Slot",
    "analysed",
    "analysed_trace",
]

#: Why the channels of the result stay: no refusal, but the contract.
OUTPUT = "output of the model"
#: Why the channels of an argument stay.
INPUT = "input of the model"

#: Given a test for kept atoms, the atoms that must stay too.
Balance = Callable[[Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Options:
    """What the caller asked for, and what trials have shown not to work.

    ``refused``: group -> why it keeps its width; ``alone``: layer -> why nothing is put around it.
    """

    border: str = "table"
    keep: tuple[str, ...] = ()
    round_to: int = 1
    promises: Promises = field(default_factory=Promises)
    merge: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """An axis of a parameter or buffer that is cut with the channels."""

    tensor: str
    axis: int
    atoms: Tensor


class Analysis:
    """The facts of a traced model, collected by the rules."""

    def __init__(self, model: nn.Module, trace: Traced, options: Options) -> None:
        self.model, self.trace, self.options = model, trace, options
        self.atoms = Atoms()
        self.layers: list[Layer] = []
        self.slots: list[Slot] = []
        self.notes: dict[str, str] = {}  # layer -> why it is left alone
        self.balances: list[Balance] = []
        self.tails: list[Tail] = []
        self._labels: dict[str, tuple[Tensor, ...]] = {}
        self._hooks = _hooked(model)
        self.taps = self._hooks | set(options.keep)

    def module(self, path: str) -> nn.Module | None:
        """The module at a path, if there is one; a leaf itself rather than its stand-in."""
        try:
            return behind(self.model.get_submodule(path))
        except AttributeError:
            return None

    def may_surround(self, step: Step, path: str) -> bool:
        """Whether modules may be put around a layer.

        It is called as a module, no hook sees its input and output, and trials agree.
        """
        if path in self.options.alone:
            self.notes.setdefault(path, f"not narrowed: {self.options.alone[path]}")
            return False
        return step.path == path != "" and path not in self._hooks

    def slot(self, tensor: str, axis: int, atoms: Tensor) -> None:
        """Cuts an axis of a parameter or buffer with the channels."""
        self.slots.append(Slot(tensor, axis, atoms))

    def trouble(self, facts: Facts | None, what: str) -> str | None:
        """Why a layer's parameter cannot be cut, or None."""
        if facts is None:
            return None
        name = facts.source
        if name is None:
            return f"{what} is computed, not a parameter"
        if self.trace.uses[name] > 1:
            return f"{name} is shared by {self.trace.uses[name]} operations"
        if not bool(torch.isfinite(facts.value).all()):
            return f"{name} is not finite"
        return None

    def loose(self) -> set[int]:
        """First atoms of the axes of parameters that no layer owns."""
        return {int(f.flatten()[0]) for fields in self._labels.values() for f in fields}

    def run(self) -> None:
        """Propagates facts through the graph, forward."""
        environment: dict[fx.Node, Any] = {}
        last_use: dict[fx.Node, fx.Node] = {}
        for node in self.trace.graph.nodes:
            for source in node.all_input_nodes:
                last_use[source] = node
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                environment[node] = self._placeholder(node)
            elif node.op == "call_function":
                environment[node] = self._call(node, environment)
            elif node.op == "output":
                self._output(_pytree.tree_map(lambda n: environment.get(n, n), node.args))
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    del environment[source]

    def _placeholder(self, node: fx.Node) -> Any:
        value = self.trace.values[node.name]
        if not isinstance(value, Tensor):
            return value
        name = self.trace.sources.get(node.name)
        if name is None and node.name in self.trace.inputs:
            return self._input(node.name, value)
        return replace(no_facts(value, CONSTANT), source=name)

    def labelled(self, facts: Facts) -> Facts:
        """A parameter or buffer with channels of its own along every axis."""
        name = facts.source
        if name is None or not facts.value.is_floating_point():
            return facts
        if name not in self._labels:
            fields = []
            for axis, size in enumerate(facts.shape):
                if size > 1:
                    atoms = self.atoms.new(size, name)
                    self.slots.append(Slot(name, axis, atoms))
                    shape = [1] * facts.ndim
                    shape[axis] = size
                    fields.append(atoms.reshape(shape))
            self._labels[name] = tuple(fields)
        return replace(facts, fields=self._labels[name], source=None)

    def _input(self, name: str, value: Tensor) -> Facts:
        promised = self.options.promises.constants.get(name)
        facts = no_facts(value, LIVE)
        if name in self.options.promises.ranges:
            ends = self.options.promises.ranges[name]
            ones = torch.ones_like(facts.kind, dtype=torch.float64)
            facts = replace(facts, bounds=Bounds(*(ones * end for end in ends)))
        if not promised:
            return facts
        axis = channel_axis(value)
        width = value.shape[axis]
        atoms = self.atoms.new(width, name)
        self.atoms.pin(atoms, INPUT)
        shape = [1] * value.dim()
        shape[axis] = width
        kind = torch.full((width,), LIVE, dtype=torch.uint8)
        kind[list(promised)] = CONSTANT
        return replace(facts, kind=kind.reshape(shape), fields=(atoms.reshape(shape),))

    def _call(self, node: fx.Node, environment: dict[fx.Node, Any]) -> Any:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: environment[n])
        args, kwargs = arguments
        if node.target is operator.getitem:
            sequence: Any = args[0]
            return sequence[args[1]]
        values = map_facts(lambda facts: facts.value, arguments)
        value = node.target(*values[0], **values[1])  # type: ignore[operator]
        step = Step(self, node, tuple(args), dict(kwargs), value)
        readers = [len(facts.tail.readers) for facts in step.facts() if facts.tail is not None]
        result = RULES.get(str(node.target), opaque)(step)
        if self.options.promises.ranges:
            result = bounded(step, result)
        result = map_facts(demote, result)
        self._follow_tails(step, result, readers)
        if self.taps & owners(node):
            self._tap(node, result)
        return result

    def _follow_tails(self, step: Step, result: Any, readers: list[int]) -> None:
        """Blocks the features of a norm whose output is neither passed on nor read linearly."""
        passed = {id(facts.tail) for facts in tensors_in(result)}
        tails = [facts.tail for facts in step.facts() if facts.tail is not None]
        for tail, before in zip(tails, readers, strict=True):
            if id(tail) not in passed and len(tail.readers) == before:
                tail.blocked = True

    def _tap(self, node: fx.Node, result: Any) -> None:
        for path in self.taps & owners(node):
            asked = path in self.options.keep
            reason = f"{path} is {'kept as asked' if asked else 'read by a hook'}"
            for facts in tensors_in(result):
                if facts.tail is not None:
                    facts.tail.blocked = True
                for atoms in facts.fields:
                    self.atoms.pin(atoms, reason)

    def _output(self, results: Any) -> None:
        for facts in tensors_in(results):
            if facts.tail is not None:
                facts.tail.blocked = True
            for atoms in facts.fields:
                self.atoms.pin(atoms, OUTPUT)

    def solve(self) -> set[int]:
        """Representatives of the classes that stay: the least set closed under all demands."""
        while True:
            # What has to be evened out is known only once all demands are.
            kept = self._closed([*self.balances, self._never_empty])
            settled = [tail.settle(partial(self.holds, kept)) for tail in self.tails]
            if not any(settled):
                return kept

    def holds(self, kept: set[int], atoms: Tensor) -> Tensor:
        """Which atoms are in classes that stay."""
        flags = [self.atoms.find(atom) in kept for atom in atoms.flatten().tolist()]
        return torch.tensor(flags, dtype=torch.bool).reshape(atoms.shape)

    def needed(self) -> set[int]:
        """Those that are read or pinned, without what stays to even out widths."""
        return self._closed([])

    def _closed(self, corrections: list[Balance]) -> set[int]:
        kept = set(self.atoms.pinned())
        holds = partial(self.holds, kept)
        demands = [layer.demand for layer in reversed(self.layers)]
        while True:
            before = len(kept)
            for demand in demands:
                kept.update(self.atoms.find(a) for a in demand(holds).unique().tolist())
            if len(kept) > before:
                continue
            for correct in corrections:
                kept.update(self.atoms.find(a) for a in correct(holds).unique().tolist())
                if len(kept) > before:
                    break
            else:
                return kept

    def _never_empty(self, holds: Callable[[Tensor], Tensor]) -> Tensor:
        empty = [s.start for s in self.atoms.spaces if not bool(holds(s.atoms).any())]
        return torch.tensor(empty, dtype=torch.int64)


def _hooked(model: nn.Module) -> set[str]:
    return {
        path
        for path, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }


def analysed(model: nn.Module, inputs: Inputs, options: Options) -> Outcome:
    """Traces and analyses a plain float64 model in evaluation mode."""
    with traced(model, inputs) as trace:
        return analysed_trace(model, trace, options)


def analysed_trace(model: nn.Module, trace: Traced, options: Options) -> Outcome:
    """Analyses a model that has been traced, within the block of its trace."""
    analysis = Analysis(model, trace, options)
    with torch.no_grad():
        analysis.run()
        for space in analysis.atoms.spaces:
            if space.name in options.refused:
                analysis.atoms.pin(space.atoms, options.refused[space.name])
        return Outcome(analysis, analysis.solve())


class Outcome:
    """The solved analysis: which channels stay, and the surgery that follows."""

    def __init__(self, analysis: Analysis, kept: set[int]) -> None:
        self._analysis, self._kept = analysis, kept
        self.edits: list[Edit] = []
        for layer in analysis.layers:
            self.edits += layer.edits(self.holds)
        for slot in analysis.slots:
            keep = self.holds(slot.atoms)
            if not bool(keep.all()):
                self.edits.append(cut(slot.tensor, slot.axis, keep))

    @property
    def analysis(self) -> Analysis:
        """What the plan was found by."""
        return self._analysis

    def holds(self, atoms: Tensor) -> Tensor:
        """Which atoms stay."""
        return self._analysis.holds(self._kept, atoms)

    def groups(self) -> list[ChannelGroup]:
        """The channel groups, with the reason of whatever stays unread."""
        constants = self._constants()
        groups: list[ChannelGroup] = []
        for space in self._analysis.atoms.spaces:
            held = self.holds(space.atoms)
            reasons = self._reasons(space.atoms)
            groups.append(
                ChannelGroup(
                    space.name,
                    space.width,
                    indices(held),
                    {i: constants[a] for i, a in enumerate(space.atoms.tolist()) if a in constants},
                    max(reasons, key=lambda reason: reasons[reason]) if reasons else None,
                )
            )
        return groups

    def refusals(self) -> list[Refusal]:
        """Groups that stay for a reason other than being the output."""
        found = [Refusal(layer, 0, why) for layer, why in self._analysis.notes.items()]
        loose = self._analysis.loose()
        for space in self._analysis.atoms.spaces:
            if space.start in loose:
                continue  # positions of a table, say: its channels are those of a layer
            for reason, count in self._reasons(space.atoms).items():
                if reason not in (OUTPUT, INPUT, FEATURE):
                    found.append(Refusal(space.name, count, reason))
        return found

    def _reasons(self, atoms: Tensor) -> Counter[str]:
        pins, find = self._analysis.atoms.pins, self._analysis.atoms.find
        roots = [find(atom) for atom in atoms.tolist()]
        return Counter(pins[root] for root in roots if root in pins)

    def _constants(self) -> dict[int, float]:
        """Removed atom -> the constant that was folded for it."""
        constants: dict[int, float] = {}
        for layer in self._analysis.layers:
            reads, values = layer.folded()
            if reads is None:
                continue
            for atom, value, held in zip(
                reads.tolist(), values.tolist(), self.holds(reads).tolist(), strict=True
            ):
                if value and not held:
                    constants[atom] = value
        return constants
