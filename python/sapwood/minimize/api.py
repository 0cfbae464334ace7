"""``analyze`` and ``minimize``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize._analysis import Options
from sapwood.minimize._masks import stored
from sapwood.minimize._planning import Source, planned, wide
from sapwood.minimize._promises import Promises
from sapwood.minimize._trace import Inputs
from sapwood.minimize.errors import MinimizeError
from sapwood.minimize.plan import Plan
from sapwood.minimize.report import MinimizeReport, cost, moved_parameters, track
from sapwood.minimize.surgery import operate
from sapwood.minimize.verify import TOLERANCE, Observation, Reference, difference

__all__ = ["analyze", "minimize"]

_RULES = ("exact", "exact+merge")


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
        rules: ``"exact"``, or ``"exact+merge"``, which also merges units of one layer that are
            multiples of each other, multiplies out chains of linear layers where the product is
            smaller, and takes units that nobody reads their weights. Sums are then rounded
            differently.
        promises: what holds for every input, ``{"input": {"constant": {channel: value}, "range":
            (0, 1)}}``, with the argument's name, or ``"input"`` for a single one; a range holds for
            all entries and may end in infinity. The network is exact only for inputs that keep the
            promise; report and file carry it.
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
    source = Source(model, masks, force_eval)
    inputs = Inputs.of(example_inputs)
    promised = Promises.of(promises, source.plain(), inputs)
    options = Options(border, tuple(keep), round_to, promised, rules == "exact+merge")
    return planned(source, wide(inputs), options)[0]


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
    source = Source(model, masks, force_eval)
    inputs = Inputs.of(example_inputs)
    promised = Promises.of(promises, source.plain(), inputs)
    seen = Observation(wide(inputs), promised, verify)
    options = Options(border, tuple(keep), round_to, promised, rules == "exact+merge")
    plan, trial = planned(source, seen.inputs, options, seen)
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
    _check.one_of("minimize", "rules", rules, _RULES)
    _check.one_of("minimize", "border", border, ("table", "ones", "refuse"))
    if round_to < 1:
        _check.fail(ValueError, "minimize", "round_to", "be at least 1", round_to)


def _check_keep(model: nn.Module, keep: Sequence[str]) -> None:
    names = {name for name, _ in model.named_modules()}
    for name in keep:
        if name not in names:
            _check.fail(ValueError, "minimize", "keep", "name modules of the model", repr(name))
