"""What a rule receives, and the table from traced operations to rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from sapwood.minimize._facts import BY_SIZE, LIVE, Facts, compress, no_facts
from sapwood.minimize._trace import owner

if TYPE_CHECKING:
    from sapwood.minimize._analysis import Analysis

__all__ = ["RULES", "Rule", "Step", "opaque", "rule", "tensors_in"]


@dataclass(frozen=True)
class Step:
    """One traced operation: its arguments as facts, and the values that it computed."""

    analysis: Analysis
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any

    @property
    def name(self) -> str:
        """The operation, as a report names it."""
        return str(self.node.target).removeprefix("aten.").split(".")[0]

    @property
    def path(self) -> str:
        """The innermost module around the operation."""
        return owner(self.node)

    @property
    def place(self) -> str:
        """The operation and where it stands, for reasons."""
        return f"{self.name} in {self.path}" if self.path else self.name

    def bound(self) -> dict[str, Any]:
        """Every argument of the operation by name, defaults included."""
        schema = self.node.target._schema  # type: ignore[union-attr]
        bound: dict[str, Any] = {}
        for place, argument in enumerate(schema.arguments):
            if place < len(self.args):
                bound[argument.name] = self.args[place]
            else:
                default = argument.default_value if argument.has_default_value() else None
                bound[argument.name] = self.kwargs.get(argument.name, default)
        return bound

    def facts(self) -> list[Facts]:
        """The tensor arguments."""
        return list(tensors_in((self.args, self.kwargs)))

    def rerun(self, swap: Callable[[Facts], Tensor]) -> Any:
        """The operation on other tensors in place of its own."""
        replaced = map_facts(swap, (self.args, self.kwargs))
        return self.node.target(*replaced[0], **replaced[1])  # type: ignore[operator]

    def pin(self, facts: Facts, reason: str) -> None:
        """Keeps every channel of an argument."""
        for field in facts.fields:
            self.analysis.atoms.pin(field, reason)


Rule = Callable[[Step], Any]
RULES: dict[str, Rule] = {}

_R = TypeVar("_R", bound=Rule)


def rule(*names: str) -> Callable[[_R], _R]:
    """Registers a rule for traced operations, by names such as ``aten.linear.default``."""

    def register(function: _R) -> _R:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def tensors_in(tree: Any) -> Iterator[Facts]:
    """All facts in nested arguments."""
    for leaf in _pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, Facts)):
        if isinstance(leaf, Facts):
            yield leaf


def map_facts(function: Callable[[Facts], Any], tree: Any) -> Any:
    """Nested arguments with every facts replaced."""
    return _pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Facts) else leaf,
        tree,
        is_leaf=lambda x: isinstance(x, Facts),
    )


def opaque(step: Step, reason: str | None = None) -> Any:
    """No rule: all channels of the arguments stay, and the result has none of its own."""
    kind = max((int(facts.kind.max()) for facts in step.facts()), default=BY_SIZE)
    for facts in step.facts():
        step.pin(facts, reason or f"no rule for {step.place}")
    if reason is not None:
        step.analysis.notes.setdefault(step.path or step.name, reason)
    kind = LIVE if kind == LIVE else BY_SIZE
    return _pytree.tree_map(lambda v: no_facts(v, kind) if isinstance(v, Tensor) else v, step.value)


def moved_kind(step: Step, source: Facts) -> Any:
    """The kind of a tensor after an operation that only moves entries."""
    moved = step.rerun(
        lambda facts: facts.kind.expand(facts.shape) if facts is source else facts.value
    )
    return _pytree.tree_map(lambda t: compress(t), moved)


def largest(kinds: list[Tensor]) -> Tensor:
    """The largest kind at every place of broadcastable tensors."""
    result = kinds[0]
    for kind in kinds[1:]:
        result = torch.maximum(result, kind)
    return result
