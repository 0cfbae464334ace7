"""How sparse a model is, counted twice: by its masks and by its weights."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from sapwood.pruning import _optim
from sapwood.pruning._distributed import full, local, place, totals
from sapwood.pruning._names import NamedParameters
from sapwood.pruning.masks import MaskSet

__all__ = ["SparsityReport", "TensorReport"]

_WIDTH = 80


@dataclass(frozen=True)
class TensorReport:
    """One tensor. ``revived`` weights are masked but not zero, ``idle`` ones kept but zero."""

    name: str
    shape: tuple[int, ...]
    numel: int
    kept: int
    nonzero: int
    revived: int
    idle: int
    dead_outputs: int
    dead_inputs: int
    at_minimum: bool

    @property
    def sparsity_by_mask(self) -> float:
        """Share of masked elements."""
        return 1.0 - self.kept / self.numel if self.numel else 0.0

    @property
    def sparsity_by_weight(self) -> float:
        """Share of zero weights."""
        return 1.0 - self.nonzero / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity per tensor and in total; compare the counts by mask and by weight.

    Example:
        >>> import torch
        >>> from sapwood.pruning import SparsityReport, prune
        >>> model = torch.nn.Linear(8, 8)
        >>> report = SparsityReport.of(model, prune(model, 0.75))
        >>> report.consistent, report.sparsity_by_mask, report.sparsity_by_weight
        (True, 0.75, 0.75)

    Args:
        tensors: one entry per mask.
        parameters: elements of all parameters of the model, pruned or not.
        parameter_zeros: zeros among them.
        state_zeros: zeros in the optimizer state of the masked parameters.
        state_elements: elements of that state; 0 without an optimizer.
        digest: digest of the masks.
    """

    tensors: tuple[TensorReport, ...]
    parameters: int
    parameter_zeros: int
    state_zeros: int
    state_elements: int
    digest: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        masks: MaskSet,
        *,
        optimizers: Sequence[Optimizer] = (),
        min_keep_per_layer: int = 1,
    ) -> SparsityReport:
        """Counts everything; collective for a sharded model.

        Args:
            model: the model.
            masks: its masks.
            optimizers: whose state to count.
            min_keep_per_layer: tensors that keep no more than this are marked.

        Returns:
            The report.

        Raises:
            MaskMatchError: if a mask has no parameter in the model.
            ValueError: if a shape differs.
        """
        where = "sapwood.pruning.SparsityReport.of"
        named = NamedParameters.of(model)
        found = masks.parameters_of(named, True, where)
        zeros, elements = _optim.state_zeros(optimizers, found.values())
        return cls(
            tensors=tuple(
                _tensor(name, p.detach(), place(masks[name], p), min_keep_per_layer)
                for name, p in found.items()
            ),
            parameters=sum(p.numel() for p in named.parameters.values()),
            parameter_zeros=_zeros([p.detach() for p in named.parameters.values()]),
            state_zeros=zeros,
            state_elements=elements,
            digest=masks.digest(),
        )

    @property
    def prunable(self) -> int:
        """Elements under masks."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def sparsity_by_mask(self) -> float:
        """Share of the prunable elements that the masks switch off."""
        kept = sum(tensor.kept for tensor in self.tensors)
        return 1.0 - kept / self.prunable if self.prunable else 0.0

    @property
    def sparsity_by_weight(self) -> float:
        """Share of the prunable elements that are zero."""
        nonzero = sum(tensor.nonzero for tensor in self.tensors)
        return 1.0 - nonzero / self.prunable if self.prunable else 0.0

    @property
    def sparsity_of_model(self) -> float:
        """Share of zeros among all parameters."""
        return self.parameter_zeros / self.parameters if self.parameters else 0.0

    @property
    def consistent(self) -> bool:
        """Whether masks and weights agree element by element."""
        return all(not tensor.revived and not tensor.idle for tensor in self.tensors)

    def headline(self) -> str:
        """One line; it starts with MISMATCH when masks and weights disagree."""
        if not self.consistent:
            revived = sum(tensor.revived for tensor in self.tensors)
            idle = sum(tensor.idle for tensor in self.tensors)
            return f"MISMATCH: {revived} masked weights are not zero, {idle} kept weights are zero"
        return f"masks and weights agree: {self.sparsity_by_mask:.4%} of {self.prunable} are zero"

    def table(self) -> str:
        """Monospaced text, 80 columns at most; long names keep their end."""
        lines = [
            self.headline(),
            f"{'tensor':<26}{'shape':>16}{'kept':>10}{'mask':>8}{'weight':>8}{'dead o/i':>12}",
            "-" * _WIDTH,
        ]
        lines += [_line(tensor) for tensor in self.tensors]
        lines.append("-" * _WIDTH)
        lines.append(
            f"{'prunable':<26}{self.prunable:>16}{sum(t.kept for t in self.tensors):>10}"
            f"{self.sparsity_by_mask:>8.2%}{self.sparsity_by_weight:>8.2%}"
        )
        lines.append(
            f"{'all parameters':<26}{self.parameters:>16}"
            f"{self.parameters - self.parameter_zeros:>10}{'':>8}{self.sparsity_of_model:>8.2%}"
        )
        if self.state_elements:
            share = self.state_zeros / self.state_elements
            lines.append(f"{'optimizer state':<26}{self.state_elements:>16}{'':>18}{share:>8.2%}")
        lines.append(f"masks {self.digest[:16]}; * holds no more than the minimum per layer")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All fields and totals as a JSON object."""
        totals = {
            "prunable": self.prunable,
            "sparsity_by_mask": self.sparsity_by_mask,
            "sparsity_by_weight": self.sparsity_by_weight,
            "sparsity_of_model": self.sparsity_of_model,
            "consistent": self.consistent,
        }
        return json.dumps({**totals, **asdict(self)})

    def to_csv(self) -> str:
        """One row per tensor, with a header."""
        text = io.StringIO()
        fields = [*TensorReport.__dataclass_fields__, "sparsity_by_mask", "sparsity_by_weight"]
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        for tensor in self.tensors:
            writer.writerow(
                {
                    **asdict(tensor),
                    "shape": "x".join(str(size) for size in tensor.shape),
                    "sparsity_by_mask": tensor.sparsity_by_mask,
                    "sparsity_by_weight": tensor.sparsity_by_weight,
                }
            )
        return text.getvalue()

    def to_svg(self) -> str:
        """What every tensor keeps as bars, by mask and by weight: the text of an SVG file.

        Raises:
            ModuleNotFoundError: when matplotlib is not installed.
        """
        from sapwood.report import charts, plots

        rows = [
            charts.ShareRow(
                tensor.name,
                (1.0 - tensor.sparsity_by_mask, 1.0 - tensor.sparsity_by_weight),
                f"{tensor.kept:,} of {tensor.numel:,}",
            )
            for tensor in self.tensors
        ]
        kept = sum(tensor.kept for tensor in self.tensors)
        title = f"Weights kept: {kept:,} of {self.prunable:,}, {1.0 - self.sparsity_by_mask:.2%}"
        title = title if self.consistent else f"MISMATCH. {title}"
        with plots.style():
            figure = charts.share_bars(rows, ("by mask", "by weight"), title)
            return plots.standalone(figure, self.headline())


def _tensor(name: str, weight: Tensor, mask: Tensor, minimum: int) -> TensorReport:
    here = local(mask)
    nonzero = local(weight) != 0  # NaN counts as non-zero
    counted = (here, nonzero, nonzero & ~here, ~nonzero & here)
    ((kept, nonzeros, revived, idle),) = totals(
        [[int(part.count_nonzero()) for part in counted]], [weight]
    )
    outputs, inputs = _dead(full(mask))
    return TensorReport(
        name=name,
        shape=tuple(weight.shape),
        numel=weight.numel(),
        kept=kept,
        nonzero=nonzeros,
        revived=revived,
        idle=idle,
        dead_outputs=outputs,
        dead_inputs=inputs,
        at_minimum=kept <= min(minimum, weight.numel() - 1),
    )


def _zeros(tensors: Sequence[Tensor]) -> int:
    nonzero = totals([[int(local(tensor).count_nonzero())] for tensor in tensors], tensors)
    return sum(t.numel() - count for t, (count,) in zip(tensors, nonzero, strict=True))


def _dead(mask: Tensor) -> tuple[int, int]:
    """Output and input units without any kept weight; mask: (out, in, *kernel)."""
    if mask.dim() < 2 or mask.numel() == 0:
        return 0, 0
    alive = mask.flatten(2).any(2) if mask.dim() > 2 else mask  # (out, in)
    return int((~alive.any(1)).sum()), int((~alive.any(0)).sum())


def _line(tensor: TensorReport) -> str:
    name = tensor.name if len(tensor.name) <= 24 else "..." + tensor.name[-21:]
    mark = "*" if tensor.at_minimum else " "
    shape = "x".join(str(size) for size in tensor.shape)
    return (
        f"{mark}{name:<25}{shape:>16}{tensor.kept:>10}{tensor.sparsity_by_mask:>8.2%}"
        f"{tensor.sparsity_by_weight:>8.2%}{f'{tensor.dead_outputs}/{tensor.dead_inputs}':>12}"
    )
