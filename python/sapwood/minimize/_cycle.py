"""What the cycle driver keeps: networks, figures, and the folder they can be resumed from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from sapwood._files import atomic_write_bytes, atomic_write_text, read_tensors
from sapwood.minimize._trace import Inputs
from sapwood.minimize.api import minimize
from sapwood.minimize.release import evaluating
from sapwood.minimize.report import MinimizeReport, cost
from sapwood.minimize.storage import load, save
from sapwood.pruning.masks import MaskSet

__all__ = ["Cycle", "SqueezeReleaseResult", "Store", "Subject"]

_NUMBERS = (int, float)
_STATE, _DENSE, _FORMAT = "squeeze_release.json", "dense.safetensors", "sapwood.squeeze_release/1"


@dataclass(frozen=True)
class Cycle:
    """One finished cycle: sizes of its minimized network and what it still can do.

    ``number`` 0 is the dense network. ``nonzeros`` are the kept weights of the masks, ``sparsity``
    the share of zeros left inside the minimized weights, ``release_rise`` the relative rise of the
    calibration loss right after the release that began the cycle.
    """

    number: int
    parameters: int
    bytes: int
    macs: int
    nonzeros: int
    sparsity: float
    metric: float
    max_error: float | None = None
    release_rise: float | None = None
    refusals: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        number: int,
        small: nn.Module,
        report: MinimizeReport,
        metric: float,
        release_rise: float | None,
    ) -> Cycle:
        """Of a minimized network; its weights are the parameters with two axes or more."""
        weights = [p.detach() for p in small.parameters() if p.dim() > 1]
        kept = sum(int(w.count_nonzero()) for w in weights)
        total = sum(w.numel() for w in weights)
        return cls(
            number,
            report.parameters_after,
            report.bytes_after,
            report.macs_after,
            kept,
            1.0 - kept / total if total else 0.0,
            metric,
            report.max_error,
            release_rise,
            tuple(str(refusal) for refusal in report.refusals),
        )


@dataclass(frozen=True)
class SqueezeReleaseResult:
    """What :class:`SqueezeRelease` returns.

    ``networks`` are those of the cycles, in order; ``pareto`` the cycles that no other one beats in
    both size and metric, the dense network included; ``best`` the smallest one within ``max_drop``
    of the dense metric, or of all, and ``model`` its network.
    """

    model: nn.Module
    best: Cycle
    dense: Cycle
    cycles: tuple[Cycle, ...]
    pareto: tuple[Cycle, ...]
    networks: tuple[nn.Module, ...] = field(repr=False)

    @classmethod
    def of(
        cls, subject: Subject, networks: Sequence[nn.Module], max_drop: float | None
    ) -> SqueezeReleaseResult:
        """Sorts the cycles."""
        points = [subject.point, *subject.cycles]
        allowed = points
        if max_drop is not None:
            allowed = [p for p in points if p.metric >= subject.point.metric - max_drop]
        best = min(allowed, key=lambda point: (point.parameters, -point.metric))
        model = subject.model if best.number == 0 else networks[best.number - 1]
        front = [p for p in points if not any(_beats(other, p) for other in points)]
        return cls(model, best, subject.point, tuple(subject.cycles), tuple(front), tuple(networks))

    @property
    def reduction(self) -> float:
        """How many times fewer parameters the best network has than the dense one."""
        return self.dense.parameters / self.best.parameters

    def to_dict(self) -> dict[str, Any]:
        """Figures as JSON values."""
        return {
            "dense": asdict(self.dense),
            "cycles": [asdict(cycle) for cycle in self.cycles],
            "pareto": [cycle.number for cycle in self.pareto],
            "best": self.best.number,
            "reduction": self.reduction,
        }


def _beats(one: Cycle, other: Cycle) -> bool:
    better = one.metric > other.metric or one.parameters < other.parameters
    return better and one.metric >= other.metric and one.parameters <= other.parameters


@dataclass
class Subject:
    """The network that a run began with, and what became of it.

    ``names`` are the prunable parameters of the latest network where rules chose them, else None;
    ``prunable`` is the number of their weights in the dense one.
    """

    model: nn.Module
    point: Cycle
    prunable: int
    names: list[str] | None
    cycles: list[Cycle] = field(default_factory=list)
    networks: list[nn.Module] = field(default_factory=list)

    @classmethod
    def dense(
        cls, model: nn.Module, metric: float, masks: MaskSet, example: Tensor, *, rules: bool
    ) -> Subject:
        """The dense network, measured; ``rules`` says whether ``masks`` are not the default."""
        device = next(model.parameters()).device
        with evaluating(model):
            size = cost(model, Inputs.of(example.to(device)))
        total = sum(count for _, count in masks.counts().values())
        point = Cycle(0, size.parameters, size.bytes, size.macs, total, 0.0, metric)
        return cls(model, point, total, list(masks) if rules else None)

    def exceeds(self, max_drop: float | None) -> bool:
        """Whether the latest cycle lost more than allowed."""
        if max_drop is None or not self.cycles:
            return False
        return self.cycles[-1].metric < self.point.metric - max_drop

    def minimize(
        self, model: nn.Module, masks: MaskSet, example: Tensor
    ) -> tuple[nn.Module, MinimizeReport]:
        """Minimizes and follows chosen parameters to their new names."""
        small, report = minimize(model, example, masks=masks, force_eval=True)
        if self.names is not None:
            moved = report.param_map
            self.names = [moved[name].name for name in self.names if name in moved]
        return small, report

    def masks(self, model: nn.Module, *, zeros: bool = False) -> MaskSet:
        """Of the prunable parameters: everything kept, or what is not zero."""
        make = MaskSet.from_zeros if zeros else MaskSet.dense
        return make(model, include=self.names)


class Store:
    """The folder of a run; without one nothing is kept."""

    def __init__(
        self, folder: str | os.PathLike[str] | None, setup: dict[str, Any], resume: bool
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._setup = json.loads(json.dumps(setup))
        self._resume = resume

    def load(self, model: nn.Module, make: Callable[[], nn.Module]) -> Subject | None:
        """The run so far; ``model`` gets the dense weights. None when there is nothing.

        Raises:
            ValueError: if the folder holds another run, or one and ``resume`` is not set.
        """
        if self._folder is None:
            return None
        where = "sapwood.minimize.SqueezeRelease"
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _STATE
        if not path.exists():
            return None
        if not self._resume:
            raise ValueError(
                f"{where}: checkpoint must be an empty folder without resume=True, got {path}"
            )
        state = self._state(path, where)
        try:
            points = [_cycle(row) for row in state["points"]]
            networks = [load(self._folder / _name(p.number), make) for p in points[1:]]
            prunable, names = _counted(state)
            model.load_state_dict(read_tensors(self._folder / _DENSE)[1])
            return Subject(model, points[0], prunable, names, points[1:], networks)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise self._damaged(where, error) from error

    def _state(self, path: Path, where: str) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._damaged(where, error) from None
        setup = state.get("setup") if isinstance(state, dict) else None
        if not isinstance(setup, dict) or state.get("format") != _FORMAT or setup != self._setup:
            there = setup if isinstance(setup, dict) else {}
            different = [k for k, v in self._setup.items() if there.get(k) != v]
            raise ValueError(
                f"{where}: checkpoint must be of the same run, got another "
                f"{', '.join(different) or 'format'} in {path}"
            )
        return state

    def _damaged(self, where: str, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [""])[0]
        expected = f"{where}: checkpoint must hold an undamaged run"
        return ValueError(f"{expected}, got {type(error).__name__} {reason} in {self._folder}")

    def save(self, subject: Subject, network: nn.Module, report: MinimizeReport | None) -> None:
        """Adds the network of the latest cycle, or the dense one when ``report`` is None."""
        if self._folder is None:
            return
        if report is None:
            tensors = {k: v.detach().contiguous().cpu() for k, v in network.state_dict().items()}
            atomic_write_bytes(self._folder / _DENSE, safetensors.torch.save(_untied(tensors)))
        else:
            save(network, self._folder / _name(len(subject.cycles)), report=report)
        state = {
            "format": _FORMAT,
            "setup": self._setup,
            "prunable": subject.prunable,
            "names": subject.names,
            "points": [asdict(point) for point in (subject.point, *subject.cycles)],
        }
        atomic_write_text(self._folder / _STATE, json.dumps(state, indent=1) + "\n")


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own memory for each: the format does not know shared storage."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def _name(number: int) -> str:
    return f"cycle-{number}.safetensors"


def _cycle(row: dict[str, Any]) -> Cycle:
    cycle = Cycle(**{**row, "refusals": tuple(row["refusals"])})
    integers = (cycle.number, cycle.parameters, cycle.bytes, cycle.macs, cycle.nonzeros)
    numbers = (cycle.sparsity, cycle.metric, cycle.max_error or 0.0, cycle.release_rise or 0.0)
    if not all(type(n) is int for n in integers) or not all(type(n) in _NUMBERS for n in numbers):
        raise TypeError(f"a cycle of other types: {row!r}"[:200])
    return cycle


def _counted(state: dict[str, Any]) -> tuple[int, list[str] | None]:
    prunable, names = state["prunable"], state["names"]
    is_names = names is None or (type(names) is list and all(type(n) is str for n in names))
    if type(prunable) is not int or not is_names:
        raise TypeError("prunable weights or names of other types")
    return prunable, names
