"""What a pruner writes down, as a flat dictionary and as a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sapwood
from sapwood.pruning import _container, _distributed
from sapwood.pruning._names import shape_of
from sapwood.pruning.allocation import LayerPlan
from sapwood.pruning.criteria import Criterion, describe_criterion, resolve_criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.schedules import Schedule, schedule_from_state
from sapwood.pruning.select import require_granularity, require_min_keep, require_scope

State = dict[str, Tensor | str | int | float]

_FORMAT = "sapwood.pruner/1"
_MASK = "mask/"
_SETUP = ("schedule", "criterion", "settings")
_STRINGS = ("format", "masks", *_SETUP)


@dataclass(frozen=True)
class Settings:
    """The arguments of a pruner that are neither model, schedule nor criterion."""

    scope: str | LayerPlan
    monotone: bool
    min_keep_per_layer: int
    mask_gradients: bool
    enforce: str
    seed: int
    granularity: str = "element"
    n_m: tuple[int, int] | None = None
    on_misfit: str = "raise"
    min_keep_per_unit: int = 0

    def __post_init__(self) -> None:
        where = "sapwood.pruning.Pruner"
        require_scope(self.scope, where)
        require_min_keep(self.min_keep_per_layer, where)
        require_min_keep(self.min_keep_per_unit, where, "min_keep_per_unit")
        require_granularity(
            self.granularity, self.n_m, self.on_misfit, self.min_keep_per_unit, where
        )
        if self.enforce not in ("always", "on_update"):
            raise ValueError(
                f"{where}: enforce must be 'always' or 'on_update', got {self.enforce!r}"
            )
        if self.enforce == "on_update" and not self.mask_gradients:
            raise ValueError(
                f"{where}: enforce must be 'always' without mask_gradients, got 'on_update'"
            )

    def to_json(self) -> str:
        """A JSON object."""
        values = self.arguments()
        if isinstance(self.scope, LayerPlan):
            values["scope"] = {"plan": dict(self.scope)}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The inverse; ValueError for anything else."""
        values = _container.loads_object(text, "settings")
        kinds = {
            "scope": (str, dict),
            "monotone": bool,
            "min_keep_per_layer": int,
            "mask_gradients": bool,
            "enforce": str,
            "seed": int,
            "granularity": str,
            "n_m": (list, type(None)),
            "on_misfit": str,
            "min_keep_per_unit": int,
        }
        if set(values) != set(kinds):
            raise ValueError(f"settings must be {sorted(kinds)}, got {sorted(values)}")
        for key, kind in kinds.items():
            if not isinstance(values[key], kind):  # type: ignore[arg-type]
                raise ValueError(f"setting {key} must be of another type, got {values[key]!r}")
        if isinstance(values["scope"], dict):
            values["scope"] = LayerPlan(values["scope"].get("plan", {}))
        if values["n_m"] is not None:
            values["n_m"] = tuple(values["n_m"])
        return cls(**values)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the constructor of a pruner."""
        return dict(self.__dict__)

    def selection(self) -> dict[str, Any]:
        """Keyword arguments for ``select``."""
        other = ("mask_gradients", "enforce", "seed")
        return {key: value for key, value in self.__dict__.items() if key not in other}


@dataclass(frozen=True)
class Loaded:
    """A checked state."""

    masks: MaskSet
    step_count: int
    schedule: Schedule
    criterion: Criterion | None
    settings: Settings


def collect(
    masks: MaskSet, step_count: int, schedule: Schedule, criterion: Criterion, settings: Settings
) -> State:
    """The flat dictionary; the masks are copies."""
    return {
        "format": _FORMAT,
        "step_count": step_count,
        "schedule": json.dumps(schedule.state_dict()),
        "criterion": json.dumps(describe_criterion(criterion)),
        "settings": settings.to_json(),
        "masks": json.dumps({"names": list(masks), "aliases": masks.aliases}),
        **{_MASK + name: mask.clone() for name, mask in masks.items()},
    }


def restore(state: Mapping[str, Any], schedule: Schedule | None = None) -> Loaded:
    """Checks every part of a state.

    Args:
        state: from ``collect``.
        schedule: instead of the one that the state describes.

    Raises:
        ValueError: if something is missing or not what ``collect`` writes.
    """
    for key in _STRINGS:
        if not isinstance(state.get(key), str):
            raise ValueError(f"state must hold the string {key!r}, got {state.get(key)!r}")
    if state["format"] != _FORMAT:
        raise ValueError(f"format must be {_FORMAT!r}, got {state['format']!r}")
    step = state.get("step_count")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step_count must be an integer of at least 0, got {step!r}")
    listed = _container.loads_object(state["masks"], "masks")
    names, aliases = listed.get("names"), listed.get("aliases")
    tensors = {key for key in state if key.startswith(_MASK)}
    if not isinstance(names, list) or {f"{_MASK}{name}" for name in names} != tensors:
        raise ValueError("masks must name the mask tensors of the state, got other names")
    for name in names:
        mask = state[_MASK + name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"mask {name} must be a bool tensor, got {mask!r}")
    described = _container.loads_object(state["schedule"], "schedule")
    return Loaded(
        masks=MaskSet({name: state[_MASK + name].clone() for name in names}, aliases=aliases),
        step_count=step,
        schedule=schedule_from_state(described) if schedule is None else schedule,
        criterion=_criterion(state["criterion"]),
        settings=Settings.from_json(state["settings"]),
    )


def read(path: str | os.PathLike[str], where: str, schedule: Schedule | None = None) -> Loaded:
    """The checked state in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if ``encode`` did not write it.
    """
    content = Path(path).read_bytes()
    try:
        return restore(decode(content), schedule)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: {path} must be an intact pruner file: {error}") from None


def _criterion(text: str) -> Criterion | None:
    if text == "null":
        return None
    described = _container.loads_object(text, "criterion")
    name, parameters = described.get("name"), described.get("parameters")
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise ValueError(f"criterion must have a name and parameters, got {described!r}")
    try:
        return resolve_criterion(name, "criterion", **parameters)
    except TypeError as error:
        raise ValueError(f"criterion must take its parameters: {error}") from None


def require_same_setup(mine: State, state: Mapping[str, Any]) -> None:
    """ValueError naming the first part of the set-up in which two states differ."""
    for key in _SETUP:
        here, there = json.loads(str(mine[key])), json.loads(str(state[key]))
        if here != there:
            raise ValueError(f"{key} must be this pruner's {here!r}, got {there!r}")


def encode(state: State) -> bytes:
    """A safetensors file: packed masks, everything else in the metadata.

    Sharded masks are gathered, one at a time; collective then.
    """
    masks = {key.removeprefix(_MASK): value for key, value in mask_tensors(state).items()}
    metadata = {key: str(state[key]) for key in (*_STRINGS, "step_count")}
    metadata["shapes"] = json.dumps({name: shape_of(mask) for name, mask in masks.items()})
    metadata["created_by"] = f"sapwood {sapwood.__version__}"
    return _container.encode(
        {name: _container.pack(_distributed.full(mask)) for name, mask in masks.items()}, metadata
    )


def mask_tensors(state: State) -> dict[str, Tensor]:
    """The masks among the entries of a state, under their keys."""
    return {
        key: value
        for key, value in state.items()
        if key.startswith(_MASK) and isinstance(value, Tensor)
    }


def decode(content: bytes) -> dict[str, Any]:
    """The inverse of ``encode``.

    Raises:
        ValueError: for anything that ``encode`` did not write.
    """
    packed, metadata = _container.decode(content)
    masks = _container.unpack_all(packed, metadata.get("shapes"))
    step = metadata.get("step_count", "")
    if not step.isascii() or not step.isdigit():
        raise ValueError(f"step_count must be a number, got {step!r}")
    state: dict[str, Any] = {key: metadata.get(key) for key in _STRINGS}
    state["step_count"] = int(step)
    state.update({_MASK + name: mask for name, mask in masks.items()})
    return state
