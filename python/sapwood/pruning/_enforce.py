"""Holding a model to its masks: weights, gradients and optimizer state at zero, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood.pruning import _optim
from sapwood.pruning._bits import clear_, keep_bits
from sapwood.pruning._distributed import local, place
from sapwood.pruning._names import NamedParameters, Rule, require_prunable
from sapwood.pruning.masks import MaskSet


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a parameter was found, and what clears it."""

    name: str
    path: tuple[str, ...]  # of the module that holds it
    key: str
    parameter: nn.Parameter
    pointer: int
    bits: Tensor | None  # None: this rank's part is kept whole

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still holds the same parameter with the same memory."""
        module: nn.Module | None = model
        for part in self.path:
            if module is None:
                return False
            module = module._modules.get(part)
        return (
            module is not None
            and module._parameters.get(self.key) is self.parameter
            and local(self.parameter).data_ptr() == self.pointer
        )


def starting_masks(
    model: nn.Module,
    masks: MaskSet | None,
    include: Sequence[Rule] | None,
    exclude: Sequence[Rule] | None,
    where: str,
) -> MaskSet:
    """Given masks, or all-kept ones for the parameters that the rules select."""
    if masks is None:
        return MaskSet.dense(model, include, exclude)
    if not isinstance(masks, MaskSet):
        raise TypeError(f"{where}: masks must be a MaskSet, got {type(masks).__name__}")
    for name, rules in (("include", include), ("exclude", exclude)):
        if rules is not None:
            raise ValueError(f"{where}: {name} must be None when masks are given, got {rules!r}")
    if not masks:
        raise ValueError(f"{where}: masks must hold at least one mask, got none")
    return masks


class Enforcer:
    """The masks of one model, and the parameters they belong to.

    Parameters are looked up at every use: wrappers and users replace them, move them, shard them.

    Args:
        model: bare or wrapped.
        masks: moved to the devices and placements of their parameters.
        where: for error messages.
    """

    def __init__(self, model: nn.Module, masks: MaskSet, where: str) -> None:
        self.model = model
        self._where = where
        self._cleaner = _optim.StateCleaner()
        self._masks = _placed(masks, NamedParameters.of(model), where)
        self._entries: list[_Entry] = []

    @property
    def masks(self) -> MaskSet:
        """The present masks."""
        return self._masks

    def adopt(self, masks: MaskSet, where: str) -> None:
        """Takes other masks; weights stay as they are."""
        self._masks = _placed(masks, NamedParameters.of(self.model), where)
        self._entries = []

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, for every mask."""
        return {entry.name: entry.parameter for entry in self._current()}

    def zero_weights(self) -> None:
        """Sets masked weights to +0.0."""
        for entry in self._current():
            if entry.bits is not None:
                clear_(local(entry.parameter), entry.bits)

    def zero_gradients(self) -> None:
        """Sets the gradients of masked weights to +0.0."""
        for entry in self._current():
            gradient = entry.parameter.grad
            if gradient is not None and entry.bits is not None:
                clear_(local(gradient), entry.bits)

    def clear_state(self, optimizer: Optimizer, keep: MaskSet) -> None:
        """Zeroes the optimizer's state of the weights that ``keep`` does not keep."""
        self._cleaner.clear(optimizer, {p: keep[name] for name, p in self.parameters().items()})

    def _current(self) -> list[_Entry]:
        if not self._entries or not all(e.is_current(self.model) for e in self._entries):
            named = NamedParameters.of(self.model)
            self._masks = _placed(self._masks, named, self._where)
            self._entries = [self._entry(name, named) for name in self._masks]
        return self._entries

    def _entry(self, name: str, named: NamedParameters) -> _Entry:
        canonical = named.aliases.get(name, name)
        *path, key = named.raw[canonical].split(".")
        parameter = named.parameters[canonical]
        part, mask = local(parameter), local(self._masks[name])
        return _Entry(
            name=name,
            path=tuple(path),
            key=key,
            parameter=parameter,
            pointer=part.data_ptr(),
            bits=None if bool(mask.all()) else keep_bits(mask, part),
        )


def _placed(masks: MaskSet, named: NamedParameters, where: str) -> MaskSet:
    """The masks on the devices and with the placements of their parameters."""
    found = masks.parameters_of(named, True, where)
    require_prunable(found, where)
    moved = {name: place(masks[name], parameter) for name, parameter in found.items()}
    if all(moved[name] is masks[name] for name in masks):
        return masks
    return MaskSet(moved, aliases=masks.aliases, metadata=masks.metadata)
