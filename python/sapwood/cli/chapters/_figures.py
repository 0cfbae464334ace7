"""The drawings of the first chapter; each returns an SVG for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sapwood.cli.packing import Timing, ratio
from sapwood.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CORNER = 64  # weights per side shown of a mask


@dataclass(frozen=True)
class Curve:
    """How one training run went: sparsity per step, accuracy per epoch."""

    label: str
    steps: Sequence[int]
    sparsity: Sequence[float]
    epochs: Sequence[int]
    accuracy: Sequence[float]


def training(curves: Sequence[Curve]) -> str:
    """Sparsity over the steps beside test accuracy over the epochs."""
    with plots.style():
        figure, (left, right) = plots.panels(2, height=3.1)
        for curve, colour in zip(curves, plots.SERIES, strict=False):
            left.plot(
                curve.steps, [100 * s for s in curve.sparsity], color=colour, label=curve.label
            )
            right.plot(
                curve.epochs, [100 * a for a in curve.accuracy], color=colour, label=curve.label
            )
        left.set(title="Weights switched off, %", xlabel="training step", ylim=(-3, 103))
        lowest = min(min(curve.accuracy[len(curve.accuracy) // 4 :]) for curve in curves)
        bottom = min(95.0, 100 * lowest - 0.5)
        right.set(title="Test accuracy, %", xlabel="epoch", ylim=(bottom, 100.2))
        left.legend(loc="center right", bbox_to_anchor=(1.0, 0.4))
        return plots.svg(figure, "sparsity over the training steps and test accuracy by epoch")


def speed(timings: Sequence[Timing], labels: Mapping[str, str]) -> str:
    """One panel per batch size, one bar per network, the speed-up written at its end."""
    with plots.style():
        figure, axes = plots.panels(len(timings), height=1.9)
        for ax, timing in zip(axes, timings, strict=True):
            _speed_panel(ax, timing, labels)
        return plots.svg(figure, "time of a forward pass by batch size, dense against packed")


def _speed_panel(ax: Axes, timing: Timing, labels: Mapping[str, str]) -> None:
    names = list(labels)
    seconds = [timing.best[name] for name in names]
    longest = max(seconds)
    unit, factor = ("us", 1e6) if longest < 1e-3 else ("ms", 1e3)
    for row, (name, colour) in enumerate(zip(names, plots.SERIES, strict=False)):
        ax.barh(row, seconds[row], color=colour, height=0.62)
        time = f"{seconds[row] * factor:.3g} {unit}"
        ax.text(seconds[row] + 0.03 * longest, row, time, va="center", color=plots.MUTED)
        if name != "dense":
            gain = ratio(timing.speedup(name))
            ax.text(1.6 * longest, row, gain, va="center", ha="right", weight="bold")
    ax.set(title=f"Batch {timing.batch}", xlim=(0, 1.62 * longest), ylim=(len(names) - 0.45, -0.55))
    ax.set_yticks(range(len(names)), [labels[name] for name in names])
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.spines["left"].set_visible(False)


def survivors(
    images: Tensor,  # (n, side * side) inputs of the network
    first: Mapping[str, Tensor],  # label -> mask of the first layer, (N, side * side)
    inner: Mapping[str, Tensor],  # label -> mask of an inner layer, (N, K)
) -> str:
    """Which input pixels keep their weights, and the corner of an inner mask."""
    side = round(images.shape[1] ** 0.5)
    with plots.style():
        figure, axes = plots.panels(1 + len(first) + len(inner), height=2.2)
        panels = iter(axes)
        _heat(next(panels), images.mean(0).view(side, side), "Mean digit", plots.INK)
        for (label, mask), colour in zip(first.items(), plots.SERIES[1:], strict=False):
            kept = mask.float().mean(0).view(side, side)
            _heat(next(panels), kept, f"Kept by pixel, {label}", colour)
        for (label, mask), colour in zip(inner.items(), plots.SERIES[1:], strict=False):
            _dots(next(panels), mask[:_CORNER, :_CORNER], f"Inner layer, {label}", colour)
        return plots.svg(figure, "mean input image, weights kept per pixel, inner masks")


def _heat(ax: Axes, values: Tensor, title: str, colour: str) -> None:
    """Squares whose opacity is the value relative to the largest."""
    from matplotlib.patches import Rectangle

    strength = (values / values.max().clamp(min=1e-12)).clamp(0, 1)
    for row, line in enumerate(strength.tolist()):
        for column, alpha in enumerate(line):
            square = Rectangle((column, row), 0.94, 0.94, color=colour, alpha=alpha, linewidth=0)
            ax.add_patch(square)
    _square(ax, title, values.shape[0])


def _dots(ax: Axes, mask: Tensor, title: str, colour: str) -> None:
    """One dot per kept weight, as a single path to keep the page small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = torch.tensor([[0.0, 0.0], [0.9, 0.0], [0.9, 0.9], [0.0, 0.9], [0.0, 0.0]])
    kept = mask.nonzero().flip(1)  # (nnz, 2) as column, row
    vertices: Any = (kept[:, None, :] + corners).reshape(-1, 2).numpy()
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(kept)
    ax.add_patch(PathPatch(Path(vertices, codes), facecolor=colour, linewidth=0))
    _square(ax, title, mask.shape[0])


def _square(ax: Axes, title: str, size: int) -> None:
    ax.set(xlim=(-0.1, size), ylim=(size, -0.1), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=8.5)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=True)
