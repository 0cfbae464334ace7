"""Everything that a training step changes, so that a run can stop after any step and go on."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from sapwood.pruning import _checkpoint, _state
from sapwood.pruning._checkpoint import Manifest, Tensors
from sapwood.pruning.pruner import Pruner

#: torch's generators by device, as byte tensors.
RandomState = dict[str, Tensor]

_MODEL, _AVERAGED, _PRUNER, _LOSS = "model/", "averaged/", "pruner", "loss_sum"


def random_state(device: torch.device) -> RandomState:
    """The state of the generators that training on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass(frozen=True)
class Start:
    """Where a run begins: the step, and the random states that lead to the data of that step.

    Without random states the run draws from its seed, as at step 0.
    """

    step: int = 0
    epoch_random: RandomState | None = None  # at the start of the step's epoch
    random: RandomState | None = None  # at the step itself

    def to_manifest(self) -> Manifest:
        """JSON values."""
        return {
            "step": self.step,
            "epoch_random": _as_text(self.epoch_random),
            "random": _as_text(self.random),
        }

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Start:
        """The inverse of ``to_manifest``."""
        return cls(
            int(manifest["step"]),
            _from_text(manifest["epoch_random"]),
            _from_text(manifest["random"]),
        )


@dataclass
class Session:
    """One training run between two steps."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    pruner: Pruner | None
    averaged: AveragedModel | None
    device: torch.device
    step: int
    loss_sum: Tensor  # () float32, over the steps of the present epoch
    epoch_random: RandomState | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    wall_s: float = 0.0  # of earlier parts of the run

    @property
    def position(self) -> Start:
        """Where another run would have to begin to see the same data from here on."""
        return Start(self.step, self.epoch_random, random_state(self.device))

    def capture(self) -> tuple[Manifest, Tensors]:
        """Everything as JSON values and tensors."""
        values, tensors = _checkpoint.optimizer_state(self.model, self.optimizer)
        tensors |= _checkpoint.with_prefix(_MODEL, self.model.state_dict())
        tensors[_LOSS] = self.loss_sum
        if self.averaged is not None:
            tensors |= _checkpoint.with_prefix(_AVERAGED, self.averaged.state_dict())
        if self.pruner is not None:
            tensors[_PRUNER] = as_tensor(_state.encode(self.pruner.state_dict()))
        manifest = {
            "position": self.position.to_manifest(),
            "optimizer": values,
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "wall_s": self.wall_s,
        }
        return manifest, tensors

    def restore(self, manifest: Manifest, tensors: Tensors) -> Start:
        """Takes over what ``capture`` gave; the pruner must not be attached yet."""
        if self.pruner is not None:
            self.pruner.load_state_dict(_state.decode(as_bytes(tensors[_PRUNER])))
            self.pruner.attach(self.optimizer)
        self.model.load_state_dict(_checkpoint.without_prefix(_MODEL, tensors))
        if self.averaged is not None:
            self.averaged.load_state_dict(_checkpoint.without_prefix(_AVERAGED, tensors))
        _checkpoint.restore_optimizer(self.model, self.optimizer, manifest["optimizer"], tensors)
        self.scaler.load_state_dict(manifest["scaler"])
        self.loss_sum = tensors[_LOSS].to(self.device)
        self.history = list(manifest["history"])
        self.wall_s = float(manifest["wall_s"])
        return Start.from_manifest(manifest["position"])


def as_tensor(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The inverse of ``as_tensor``."""
    return tensor.numpy().tobytes()


def _as_text(state: RandomState | None) -> dict[str, str] | None:
    if state is None:
        return None
    return {name: base64.b64encode(as_bytes(value)).decode() for name, value in state.items()}


def _from_text(state: dict[str, Any] | None) -> RandomState | None:
    if state is None:
        return None
    return {name: as_tensor(base64.b64decode(value)) for name, value in state.items()}
