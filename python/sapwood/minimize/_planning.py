"""From a model to its plan, with one whole float64 model at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize._analysis import Options, Outcome, analysed, analysed_trace
from sapwood.minimize._attention_graph import is_core
from sapwood.minimize._masks import materialised, separate
from sapwood.minimize._trace import Inputs, Outline, Traced, traced
from sapwood.minimize.attentions import Attentions, find_attentions
from sapwood.minimize.errors import MinimizeError
from sapwood.minimize.layers import Edit
from sapwood.minimize.merging import merged
from sapwood.minimize.plan import ChannelGroup, Plan, Refusal, fingerprint
from sapwood.minimize.surgery import operate
from sapwood.minimize.verify import TOLERANCE, Reference, difference

__all__ = ["Source", "planned", "wide"]

#: Parameters from which on freeing what nobody refers to is worth 0.2 s.
_MANY = 1 << 22


@dataclass(frozen=True)
class Source:
    """The model that was given; copies are made whenever one is needed rather than kept."""

    model: nn.Module
    masks: Mapping[str, Tensor] | None
    force_eval: bool

    def plain(self) -> nn.Module:
        """With plain layers, masks applied, on the numbers of the model wherever they are equal."""
        with _evaluating(self.model, self.force_eval):
            return materialised(self.model, self.masks)

    def exact(self, attention: Iterable[Edit] = ()) -> nn.Module:
        """As the trials need it: in float64, on the CPU, with edits to the common form made."""
        exact = self.plain().cpu().double()
        separate(exact, self.model)
        edits = list(attention)
        if edits:
            exact = operate(exact, edits, consume=True)
        return exact.requires_grad_(True)


@dataclass(frozen=True)
class _Decision:
    """What the analysis decided, without the trace and the masks that it was decided by."""

    edits: list[Edit]
    groups: list[ChannelGroup]
    refusals: list[Refusal]

    @classmethod
    def of(cls, outcome: Outcome) -> _Decision:
        return cls(outcome.edits, outcome.groups(), outcome.refusals())

    @classmethod
    def on(cls, exact: nn.Module, inputs: Inputs, options: Options) -> _Decision:
        """What can go of a float64 model, after merging if that is asked for."""
        if not options.merge:
            return cls.of(analysed(exact, inputs, options))
        found = merged(exact, inputs, options)
        after = cls.of(found.outcome)
        return cls([*found.edits, *after.edits], after.groups, [*after.refusals, *found.refusals])


def wide(inputs: Inputs) -> Inputs:
    return inputs.map(lambda t: t.detach().cpu().double() if t.is_floating_point() else t.cpu())


def _ignore(exact: nn.Module) -> None:
    """Nothing is to be known of the float64 model."""


def planned(
    source: Source,
    inputs: Inputs,
    options: Options,
    observe: Callable[[nn.Module], None] = _ignore,
) -> tuple[Plan, nn.Module]:
    """The plan, and the minimized float64 model.

    At no time are there two whole float64 models: surgery consumes the one that was analysed, and
    what is to be known of it is observed before.
    """
    digest = fingerprint(source.plain())
    found, decision = _analysed(source, inputs, options)
    if sum(p.numel() for p in source.model.parameters()) > _MANY:
        gc.collect()  # trace and analysis, which refer to themselves
    exact = source.exact()
    observe(exact)
    if found.edits:
        exact = operate(exact, found.edits.values(), consume=True).requires_grad_(True)
    expected = Reference.of(exact, inputs)
    if decision is None:
        decision = _Decision.on(exact, inputs, options)
    small, problem = _tried(exact, decision, expected)
    if problem is not None:
        del small
        options = _without_culprits(source, found, decision, expected, options)
        exact = source.exact(found.edits.values())
        decision = _Decision.on(exact, inputs, options)
        small, problem = _tried(exact, decision, expected)
        if problem is not None:
            raise MinimizeError(f"sapwood.minimize: the rewrite must compute the same: {problem}")
    edits = [*_needed(found, decision.edits), *decision.edits]
    if found.edits:
        del small
        # With attention that nothing was cut of as it was written.
        small = operate(source.exact(), edits, consume=True)
    refusals = [*decision.refusals, *_left_alone(found)]
    return Plan(decision.groups, edits, refusals, digest, options.promises.to_dict()), small


def _analysed(
    source: Source, inputs: Inputs, options: Options
) -> tuple[Attentions, _Decision | None]:
    """Attention, and what can go unless that needs the common form or merging comes before."""
    outline = Outline(source.plain())
    separate(outline.model, source.model)
    try:
        with traced(outline.model, inputs) as trace:
            found = Attentions({}, {})
            if _may_attend(outline.model, trace):
                outline.fill()
                found = find_attentions(outline.model, inputs, trace)
            if found.edits or options.merge:
                return found, None
            return found, _Decision.of(
                analysed_trace(outline.model, outline.lazily(trace), options)
            )
    finally:
        outline.clear()


def _may_attend(model: nn.Module, trace: Traced) -> bool:
    packed = any(type(module) is nn.MultiheadAttention for module in model.modules())
    return packed or any(is_core(node) for node in trace.graph.nodes)


def _needed(found: Attentions, edits: list[Edit]) -> list[Edit]:
    """The common forms that surgery cuts; other attention stays as it is written."""
    cut = {edit["module"] for edit in edits if edit["op"] == "attention"}
    return [
        edit
        for path, edit in found.edits.items()
        if path in cut or f"{path}.attention".lstrip(".") in cut
    ]


def _left_alone(found: Attentions) -> list[Refusal]:
    return [
        Refusal(path, 0, f"no plain attention: {reason}") for path, reason in found.refused.items()
    ]


def _tried(
    exact: nn.Module, decision: _Decision, expected: Reference
) -> tuple[nn.Module, str | None]:
    """The cut model, for which ``exact`` is used up, and what is wrong with it."""
    small = operate(exact, decision.edits, consume=True)
    try:
        error = difference(expected, small)
    except Exception as failure:
        lines = str(failure).splitlines() or [type(failure).__name__]
        return small, f"the model's code does not follow a smaller width ({lines[0]})"
    if not error <= TOLERANCE:
        return small, f"the model's code depends on the width (difference {error:.1e})"
    return small, None


def _without_culprits(
    source: Source,
    found: Attentions,
    decision: _Decision,
    expected: Reference,
    options: Options,
) -> Options:
    """Refuses the groups and the narrow layers that alone make the model fail, with the failure.

    They are tried one after the other on top of those that work, so that what fails only
    together is found too.
    """
    cut = [g.name for g in decision.groups if len(g.kept) < g.width]
    narrow = [edit["module"] for edit in decision.edits if edit["op"] in ("select", "scatter")]
    refused, alone = (dict.fromkeys(names, "not tried yet") for names in (cut, narrow))

    def refusing() -> Options:
        return replace(options, refused={**options.refused, **refused}, alone=dict(alone))

    for reasons in (refused, alone):
        for name in list(reasons):
            del reasons[name]
            exact = source.exact(found.edits.values())
            chosen = _Decision.on(exact, expected.inputs, refusing())
            _, problem = _tried(exact, chosen, expected)
            if problem is not None:
                reasons[name] = problem
    return refusing()


@contextmanager
def _evaluating(model: nn.Module, force: bool) -> Iterator[None]:
    """Evaluation mode in the block; modes are restored module by module."""
    if not model.training:
        yield
        return
    if not force:
        _check.fail(
            ValueError,
            "minimize",
            "model",
            "be in evaluation mode, where BatchNorm and dropout are fixed functions "
            "(or pass force_eval=True)",
            "a model in training mode",
        )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
