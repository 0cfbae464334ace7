"""Parameter names: stripping wrappers, tied parameters, matching of include and exclude rules."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from sapwood.pruning._distributed import show_shards

#: An exact name, a glob pattern, or a predicate on (name, parameter).
Rule = str | Callable[[str, nn.Parameter], bool]

_TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module"})
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_GLOB = frozenset("*?[")


class MaskMatchError(KeyError):
    """Names or patterns did not match the parameters they were meant for."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, as error messages print it."""
    return tuple(tensor.shape)


def closest(names: Iterable[str], known: Sequence[str]) -> str:
    """The five names of ``known`` that look most like the first of ``names``, for a message."""
    wanted = next(iter(names))
    ranked = sorted(
        known,
        key=lambda name: difflib.SequenceMatcher(None, wanted, name).ratio(),
        reverse=True,
    )
    return ", ".join(repr(name) for name in ranked[:5]) or "none"


@dataclass(frozen=True)
class NamedParameters:
    """The distinct parameters of a model under the names of the bare model.

    ``raw`` maps a clean name to the name ``model.get_parameter`` understands, ``aliases`` maps the
    further names of a tied parameter to its first one, ``owners`` lists the modules that hold it.
    """

    parameters: dict[str, nn.Parameter]
    raw: dict[str, str]
    aliases: dict[str, str]
    owners: dict[str, list[tuple[nn.Module, str]]]

    @classmethod
    def of(cls, model: nn.Module) -> NamedParameters:
        show_shards(model)
        clean_of = _module_names(model)
        found = cls({}, {}, {}, {})
        first: dict[object, str] = {}
        for raw_path, module in model.named_modules(remove_duplicate=False):
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                raw = f"{raw_path}.{key}" if raw_path else key
                name = f"{clean_of[raw_path]}.{key}" if clean_of[raw_path] else key
                canonical = first.setdefault(_identity(parameter), name)
                found.owners.setdefault(canonical, []).append((module, key))
                if canonical == name:
                    found.parameters.setdefault(name, parameter)
                    found.raw.setdefault(name, raw)
                else:
                    found.aliases[name] = canonical
        return found

    def resolve(self, name: str) -> nn.Parameter | None:
        """The parameter called ``name``, also when that is the further name of a tied one."""
        return self.parameters.get(self.aliases.get(name, name))


def _identity(parameter: nn.Parameter) -> object:
    """Equal for parameters that are the same storage seen the same way."""
    if isinstance(parameter, UninitializedParameter) or parameter.numel() == 0:
        return id(parameter)
    pointer = parameter.data_ptr()
    if pointer == 0:  # meta tensors have no storage to compare
        return id(parameter)
    return (str(parameter.device), pointer, tuple(parameter.shape), parameter.stride())


def _module_names(model: nn.Module) -> dict[str, str]:
    """Raw module path -> the path in the bare model, without the wrappers' own components."""
    hidden: set[str] = set()
    names: dict[str, str] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _WRAPPERS):
            hidden.add(f"{raw}.module" if raw else "module")
        parent, _, component = raw.rpartition(".")
        if raw == "" or raw in hidden or component in _TRANSPARENT:
            names[raw] = names.get(parent, "")
        else:
            names[raw] = f"{names[parent]}.{component}" if names[parent] else component
    return names


def normalize_keys(keys: Iterable[str]) -> dict[str, str]:
    """State-dict key -> name in the bare model.

    ``module.`` is stripped only when every key carries it, so that a submodule that happens to be
    called ``module`` keeps its name.
    """
    names = list(keys)
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    clean: dict[str, str] = {}
    for name in names:
        parts = (name.removeprefix("module.") if wrapped else name).split(".")
        clean[name] = ".".join(part for part in parts if part not in _TRANSPARENT)
    return clean


def prunable(
    model: nn.Module,
    include: Sequence[Rule] | None,
    exclude: Sequence[Rule] | None,
    types: tuple[type[nn.Module], ...],
    strict: bool,
    where: str,
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters that the rules select, in the model's order, and the aliases among them.

    Raises:
        MaskMatchError: with ``strict``, when a rule matches nothing or nothing is left.
        TypeError: when a rule is no string or callable, or a parameter is no floating tensor.
        ValueError: when a parameter is not initialised yet.
    """
    named = NamedParameters.of(model)
    default = {
        name: parameter
        for name, parameter in named.parameters.items()
        if all(key == "weight" and isinstance(owner, types) for owner, key in named.owners[name])
    }
    chosen = set(default)
    unmatched: list[str] = []
    if include is not None:
        chosen = set()
        for rule in _rules(include, "include", where):
            hits = _matches(rule, default, named)
            chosen |= hits
            if not hits:
                unmatched.append(_rule_name(rule))
    for rule in _rules(exclude or (), "exclude", where):
        hits = _matches(rule, default, named)
        chosen -= hits
        if not hits:
            unmatched.append(_rule_name(rule))
    if strict and unmatched:
        raise MaskMatchError(
            f"{where}: every include and exclude rule must match a prunable parameter, "
            f"got no match for {', '.join(unmatched)}; "
            f"closest names: {closest(unmatched, list(named.parameters))}"
        )
    if strict and not chosen:
        raise MaskMatchError(
            f"{where}: the selection must hold at least one parameter, got none; "
            f"closest names: {closest(['weight'], list(named.parameters))}"
        )
    selected = {name: p for name, p in named.parameters.items() if name in chosen}
    require_prunable(selected, where)
    return selected, {a: name for a, name in named.aliases.items() if name in chosen}


def _rules(rules: Sequence[Rule], argument: str, where: str) -> Sequence[Rule]:
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"{where}: {argument} must be a list of rules, got {rules!r}")
    for rule in rules:
        if not isinstance(rule, str) and not callable(rule):
            raise TypeError(f"{where}: {argument} must hold strings or callables, got {rule!r}")
    return rules


def _rule_name(rule: Rule) -> str:
    return repr(rule) if isinstance(rule, str) else getattr(rule, "__name__", repr(rule))


def _matches(rule: Rule, default: Mapping[str, nn.Parameter], named: NamedParameters) -> set[str]:
    """An exact name reaches every parameter; globs and callables choose among the default set."""
    if not isinstance(rule, str):
        return {name for name, parameter in default.items() if rule(name, parameter)}
    if named.resolve(rule) is not None:
        return {named.aliases.get(rule, rule)}
    if not _GLOB & set(rule):
        return set()
    hits = {name for name in default if fnmatch.fnmatchcase(name, rule)}
    tied = {name for alias, name in named.aliases.items() if fnmatch.fnmatchcase(alias, rule)}
    return hits | (tied & set(default))


def require_prunable(parameters: Mapping[str, nn.Parameter], where: str) -> None:
    """Raises unless every parameter is initialised and floating point."""
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{where}: {name} must be initialised (run one forward pass), "
                "got a lazy parameter without a shape"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{where}: {name} must be floating point, got {parameter.dtype}")


def require_matching(
    names: Mapping[str, object], named: NamedParameters, strict: bool, where: str
) -> dict[str, nn.Parameter]:
    """Looks every name up in the model; the unknown ones raise when ``strict``."""
    found = {name: named.resolve(name) for name in names}
    missing = [name for name, parameter in found.items() if parameter is None]
    if strict and missing:
        raise MaskMatchError(
            f"{where}: every mask must belong to a parameter of the model, "
            f"got no parameter for {', '.join(repr(name) for name in missing)}; "
            f"closest names: {closest(missing, list(named.parameters))}"
        )
    return {name: parameter for name, parameter in found.items() if parameter is not None}
