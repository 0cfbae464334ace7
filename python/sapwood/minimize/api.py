"""``analyze`` and ``minimize``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize._analysis import Options, Outcome, analysed, analysed_trace
from sapwood.minimize._attention_graph import is_core
from sapwood.minimize._masks import materialised, separate, stored
from sapwood.minimize._promises import Promises
from sapwood.minimize._trace import Inputs, Outline, Traced, traced
from sapwood.minimize.attentions import Attentions, find_attentions
from sapwood.minimize.errors import MinimizeError
from sapwood.minimize.layers import Edit
from sapwood.minimize.plan import ChannelGroup, Plan, Refusal, fingerprint
from sapwood.minimize.report import MinimizeReport, cost, moved_parameters, track
from sapwood.minimize.surgery import operate
from sapwood.minimize.verify import TOLERANCE, Observation, Reference, difference

__all__ = ["analyze", "minimize"]


def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    rules: str = "exact",
    promises: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    border: str = "table",
    round_to: int = 1,
    force_eval: bool = False,
) -> Plan:
    """Finds what of a masked network can go without changing its function.

    Example:
        >>> import torch
        >>> from sapwood.minimize import analyze
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).eval()
        >>> _ = model[0].weight.data[2].zero_()            # the third unit is a constant
        >>> len(analyze(model, torch.randn(2, 4)).groups[0].kept)
        2

    Args:
        model: a masked network in evaluation mode; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        masks: parameter name -> bool tensor, True keeps. None takes the masks that the model
            carries (``MaskedLinear``, ``MaskedConv2d``, ``torch.nn.utils.prune``) or the zeros of
            its weights.
        rules: ``"exact"``.
        promises: what holds for every input, ``{"input": {"constant": {channel: value}}}``, with
            the argument's name, or ``"input"`` for a single one. The network is exact only for
            inputs that keep the promise; report and file carry it.
        keep: names of modules whose outputs must keep all channels.
        border: constants in front of zero padding go into a table of border values (``"table"``),
            a channel of ones (``"ones"``), or stay (``"refuse"``).
        round_to: widths of attention heads are rounded up to a multiple.
        force_eval: switch a model in training mode to evaluation meanwhile.

    Returns:
        The plan, verified by trial: it computes the same outputs on the example inputs.

    Raises:
        MinimizeError: if the model cannot be traced.
        ValueError: if the model is in training mode, an option is unknown, or ``keep`` names no
            module.
        MaskMatchError: if a mask has no parameter.
    """
    _check_options(rules, border, round_to)
    _check_keep(model, keep)
    source = _Source(model, masks, force_eval)
    inputs = Inputs.of(example_inputs)
    promised = Promises.of(promises, source.plain(), inputs)
    plan, _ = _planned(source, _wide(inputs), Options(border, tuple(keep), round_to, promised))
    return plan


@dataclass(frozen=True)
class _Source:
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


def _wide(inputs: Inputs) -> Inputs:
    return inputs.map(lambda t: t.detach().cpu().double() if t.is_floating_point() else t.cpu())


def _ignore(exact: nn.Module) -> None:
    """Nothing is to be known of the float64 model."""


def _planned(
    source: _Source,
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
    gc.collect()  # trace and analysis, which refer to themselves
    exact = source.exact()
    observe(exact)
    if found.edits:
        exact = operate(exact, found.edits.values(), consume=True).requires_grad_(True)
    expected = Reference.of(exact, inputs)
    if decision is None:
        decision = _Decision.of(analysed(exact, inputs, options))
    small, problem = _tried(exact, decision, expected)
    if problem is not None:
        del small
        refused = _culprits(source, found, decision, expected, options)
        exact = source.exact(found.edits.values())
        decision = _Decision.of(analysed(exact, inputs, replace(options, refused=refused)))
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
    source: _Source, inputs: Inputs, options: Options
) -> tuple[Attentions, _Decision | None]:
    """Attention, and if there is none in need of the common form, what can go."""
    outline = Outline(source.plain())
    separate(outline.model, source.model)
    try:
        with traced(outline.model, inputs) as trace:
            found = Attentions({}, {})
            if _may_attend(outline.model, trace):
                outline.fill()
                found = find_attentions(outline.model, inputs, trace)
            if found.edits:
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


def _culprits(
    source: _Source,
    found: Attentions,
    decision: _Decision,
    expected: Reference,
    options: Options,
) -> dict[str, str]:
    """The groups whose removal alone makes the model fail, with the failure.

    Groups are tried one after the other on top of those that work, so that what fails only
    together is found too.
    """
    names = [g.name for g in decision.groups if len(g.kept) < g.width]
    refused = dict.fromkeys(names, "not tried yet")
    for name in list(refused):
        del refused[name]
        trial = replace(options, refused={**options.refused, **refused})
        exact = source.exact(found.edits.values())
        chosen = _Decision.of(analysed(exact, expected.inputs, trial))
        _, problem = _tried(exact, chosen, expected)
        if problem is not None:
            refused[name] = problem
    return refused


def minimize(
    model: nn.Module,
    example_inputs: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    rules: str = "exact",
    promises: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    border: str = "table",
    verify: bool = True,
    round_to: int = 1,
    inplace: bool = False,
    force_eval: bool = False,
) -> tuple[nn.Module, MinimizeReport]:
    """Rewrites a masked network into a smaller dense one that computes the same function.

    Example:
        >>> import torch
        >>> from sapwood.minimize import minimize
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).eval()
        >>> _ = model[0].weight.data[2].zero_()            # the third unit is a constant
        >>> small, report = minimize(model, torch.randn(2, 4))
        >>> small[0].out_features, report.parameters_after
        (2, 16)

    Args:
        model: a masked network in evaluation mode.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        masks: as in ``analyze``.
        rules: as in ``analyze``.
        promises: as in ``analyze``.
        keep: as in ``analyze``.
        border: as in ``analyze``.
        verify: compare both networks in float64 on random inputs too.
        round_to: as in ``analyze``.
        inplace: change ``model`` itself and return it.
        force_eval: as in ``analyze``.

    Returns:
        The minimized network, an ordinary module that is called as the model is, and the report.

    Raises:
        MinimizeError: if the model cannot be traced, or the two networks differ by more than 1e-9
            of the output's scale; the model is then unchanged.
        ValueError: if the model is in training mode, an option is unknown, or ``keep`` names no
            module.
        MaskMatchError: if a mask has no parameter.

    References:
        Our implementation of the contract of Squeeze-Release, arXiv:2606.14346; the rules are ours.
    """
    _check_options(rules, border, round_to)
    _check_keep(model, keep)
    source = _Source(model, masks, force_eval)
    inputs = Inputs.of(example_inputs)
    promised = Promises.of(promises, source.plain(), inputs)
    seen = Observation(_wide(inputs), promised, verify)
    options = Options(border, tuple(keep), round_to, promised)
    plan, trial = _planned(source, seen.inputs, options, seen)
    error = _verified(seen.expected, trial) if verify else None
    after = cost(trial, seen.inputs)
    del trial
    plain = source.plain()
    small = operate(plain, plan.edits)
    moved = moved_parameters(plain, small, plan.edits)
    old = {n.removesuffix("_orig"): p for n, p in model.named_parameters()}
    new = dict(small.named_parameters())
    sizes = [sum(t.numel() * t.element_size() for t in stored(m)) for m in (plain, small)]
    _copy_modes(model, small)
    report = MinimizeReport(
        seen.cost.parameters,
        after.parameters,
        sizes[0],
        sizes[1],
        seen.cost.macs,
        after.macs,
        error,
        plan,
        moved,
        track(old, new, moved),
        [weakref.ref(p) for name, p in old.items() if name not in moved],
    )
    if inplace:
        model.__dict__.update(small.__dict__)
        return model, report
    return small, report


def _copy_modes(model: nn.Module, small: nn.Module) -> None:
    """Training or evaluation, module by module; new modules are in the mode of their parent."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        if name not in modes:
            modes[name] = modes[name.rpartition(".")[0]]
        module.training = modes[name]


def _verified(expected: Sequence[Reference], small: nn.Module) -> float:
    """The largest error over the example and random inputs that keep the promises."""
    worst = max(difference(reference, small) for reference in expected)
    if not worst <= TOLERANCE:
        raise MinimizeError(
            f"sapwood.minimize: the minimized network must compute the same to {TOLERANCE:.0e} "
            f"of the output's scale, got {worst:.1e}"
        )
    return worst


def _check_options(rules: str, border: str, round_to: int) -> None:
    _check.one_of("minimize", "rules", rules, ("exact",))
    _check.one_of("minimize", "border", border, ("table", "ones", "refuse"))
    if round_to < 1:
        _check.fail(ValueError, "minimize", "round_to", "be at least 1", round_to)


def _check_keep(model: nn.Module, keep: Sequence[str]) -> None:
    names = {name for name, _ in model.named_modules()}
    for name in keep:
        if name not in names:
            _check.fail(ValueError, "minimize", "keep", "name modules of the model", repr(name))


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
