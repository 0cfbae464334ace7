"""What a minimization achieved."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sapwood.minimize._trace import Inputs
from sapwood.minimize.layers import Edit
from sapwood.minimize.plan import Plan, Refusal

__all__ = ["MinimizeReport", "Moved", "cost", "moved_parameters"]


@dataclass(frozen=True)
class Cost:
    """Numbers stored, bytes stored, and multiply-accumulates of one call."""

    parameters: int
    bytes: int
    macs: int


@dataclass(frozen=True)
class Moved:
    """Where a parameter went: its new name, and per axis the kept indices (None: all)."""

    name: str
    index: tuple[tuple[int, ...] | None, ...]

    def slice(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the old shape, such as an optimizer's moment."""
        for axis, keep in enumerate(self.index):
            if keep is not None:
                index = torch.tensor(keep, dtype=torch.int64, device=tensor.device)
                tensor = tensor.index_select(axis, index)
        return tensor.clone()


@dataclass(frozen=True)
class MinimizeReport:
    """Sizes before and after, the error found, and what stayed.

    ``parameters`` count the numbers of all parameters and of the indices, border taps and sums that
    minimized modules keep in buffers; ``macs`` are the multiply-accumulates of one call on the
    example inputs; ``max_error`` is the largest difference found in float64 over max(1, largest
    output), None without verification. ``param_map`` maps old parameter names to where they went.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    macs_before: int
    macs_after: int
    max_error: float | None
    plan: Plan
    param_map: dict[str, Moved]
    tracked: dict[str, tuple[weakref.ref[Any], weakref.ref[Any]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    removed: list[weakref.ref[Any]] = field(default_factory=list, repr=False, compare=False)

    @property
    def refusals(self) -> list[Refusal]:
        """What stayed for another reason than being read."""
        return self.plan.refusals

    @property
    def reduction(self) -> float:
        """How many times fewer parameters."""
        return self.parameters_before / max(1, self.parameters_after)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "reduction": self.reduction,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "max_error": self.max_error,
            "promises": self.plan.promises,
            "refusals": [str(refusal) for refusal in self.refusals],
        }

    def __str__(self) -> str:
        error = "not verified" if self.max_error is None else f"{self.max_error:.1e}"
        lines = [
            f"parameters  {self.parameters_before:>14,} -> {self.parameters_after:,}"
            f"  ({self.reduction:.2f}x smaller)",
            f"bytes       {self.bytes_before:>14,} -> {self.bytes_after:,}",
            f"MACs        {self.macs_before:>14,} -> {self.macs_after:,}",
            f"max error   {error} of the output's scale, float64",
        ]
        return "\n".join([*lines, *(f"kept        {refusal}" for refusal in self.refusals)])


def cost(model: nn.Module, inputs: Inputs) -> Cost:
    """Counts a model; buffers of ordinary layers, such as BatchNorm's, are bytes only."""
    parameters = list(model.parameters())
    ours = [
        buffer
        for module in model.modules()
        if type(module).__module__.startswith("sapwood.minimize.modules")
        for buffer in module.buffers(recurse=False)
    ]
    stored = [*parameters, *model.buffers()]
    # The fused paths of torch, taken without gradients or by attention, count no operations.
    with (
        FlopCounterMode(display=False) as counter,
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        fresh = inputs.map(lambda t: t.clone())
        model(*fresh.args, **fresh.kwargs)
    return Cost(
        sum(t.numel() for t in (*parameters, *ours)),
        sum(t.numel() * t.element_size() for t in stored),
        counter.get_total_flops() // 2,
    )


def moved_parameters(before: nn.Module, after: nn.Module, edits: list[Edit]) -> dict[str, Moved]:
    """Old name -> new name and indices, for parameters that still exist."""
    wrapped = {e["module"] for e in edits if e["op"] in ("select", "ones")}
    scattered = {e["module"] for e in edits if e["op"] == "scatter"}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    rebuilt = {e["weight"] for e in edits if e["op"] == "groups"}
    for edit in edits:
        if edit["op"] == "slice":
            kept.setdefault(edit["tensor"], {})[edit["axis"]] = tuple(edit["keep"])
        elif edit["op"] == "rescatter":
            kept[f"{edit['module']}.bias"] = {0: tuple(edit["keep"])}
        elif edit["op"] == "norm":
            for key in ("weight", "bias"):
                name = f"{edit['module']}.{key}"
                kept.setdefault(name, {})[0] = tuple(edit["keep"])
        elif edit["op"] in ("ones", "tail", "multiply"):
            rebuilt.add(f"{edit['module']}.weight")
    names = {name for name, _ in after.named_parameters()}
    moved: dict[str, Moved] = {}
    for name, parameter in before.named_parameters():
        path, _, key = name.rpartition(".")
        place = int(path in wrapped) + int(path in scattered and key == "bias")
        new = f"{path}.{place}.{key}" if path in wrapped or path in scattered else name
        if name in rebuilt or new not in names:
            continue
        axes = kept.get(name, {})
        index = tuple(axes.get(axis) for axis in range(parameter.dim()))
        moved[name] = Moved(new, index)
    return moved


def track(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], moved: Mapping[str, Moved]
) -> dict[str, tuple[weakref.ref[Any], weakref.ref[Any]]]:
    """Weak references to the old and new parameter objects, for ``remap_optimizer``."""
    return {
        name: (weakref.ref(before[name]), weakref.ref(after[target.name]))
        for name, target in moved.items()
        if name in before
    }
