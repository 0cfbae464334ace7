"""A chapter of the tour: a network that is minimized in cycles, its accuracy and its latency."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sapwood import data
from sapwood.cli import packing, tasks
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.cli.packing import Timing, ratio
from sapwood.minimize import Cycle, SqueezeRelease, SqueezeReleaseResult
from sapwood.pruning import Progress, TrainConfig
from sapwood.report import plots
from sapwood.report.page import Chapter, Figure, Section, Stat, Table

TITLE = "Shrink in cycles"
_FULL, _SMALL = "dense", "minimized"


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    source: str
    images: int
    result: SqueezeReleaseResult
    timings: list[Timing]

    @property
    def points(self) -> list[Cycle]:
        return [self.result.dense, *self.result.cycles]

    @property
    def last(self) -> Cycle:
        return self.result.cycles[-1]

    @property
    def times_smaller(self) -> float:
        return self.result.dense.parameters / self.last.parameters

    @property
    def error(self) -> float:
        """The largest difference that a rewrite made, relative to the output's scale."""
        return max(cycle.max_error or 0.0 for cycle in self.result.cycles)


def run(context: Context) -> ChapterResult:
    """Shrinks a perceptron on the digits; a quarter of a minute, less with ``quick``."""
    m = _measure(context)
    gain = m.timings[-1].speedup(_SMALL)
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_sizes(m), _speed(m)]),
        headline=f"Shrank a network {m.times_smaller:.0f}-fold to one that is {ratio(gain)} as "
        f"fast, at {100 * m.last.metric:.1f} % instead of {100 * m.result.dense.metric:.1f} %.",
        stats=[
            Stat(f"{m.times_smaller:.0f}x", f"fewer parameters after {m.last.number} cycles"),
            Stat(ratio(gain), f"as fast at batch {m.timings[-1].batch}, without sparse kernels"),
        ],
        summary=_table(m),
        remarks=[
            _faster(m),
            *packing.remarks(m.timings, [_SMALL]),
        ],
        facts=[("Cycles", "prune by groups, fine-tune, minimize, release and train again")],
        data=_data(m),
    )


def _measure(context: Context) -> Measured:
    digits = data.load_digits()
    widths = (300, 100) if context.quick else (1024, 1024)
    model = tasks.perceptron(widths, digits, context.seed)
    context.bars.start("minimize")

    def progress(now: Progress) -> None:
        context.bars.step(now.step, now.total, f"loss {now.loss:6.3f}", now.stage)

    driver = SqueezeRelease(
        cycles=3 if context.quick else 4,
        train=TrainConfig(
            epochs=8 if context.quick else 12,
            lr=0.1,
            batch_size=64,
            seed=context.seed,
            device="cpu",
        ),
        progress=progress,
    )
    pairs = (digits.train_inputs, digits.train_labels), (digits.test_inputs, digits.test_labels)
    result = driver.fit(model, *pairs)
    networks: dict[str, nn.Module] = {_FULL: model.eval(), _SMALL: result.networks[-1].eval()}
    seconds = 0.2 if context.quick else 0.6
    timings = packing.time_models(networks, digits.test_inputs, context.bars, seconds=seconds)
    return Measured(digits.source, len(digits.test_labels), result, timings)


def _lead(m: Measured) -> str:
    return (
        "A mask leaves the tensors at their full size. Minimization rewrites the masked network "
        "into a smaller dense one with the same outputs, up to rounding: a unit that nothing "
        "feeds is a constant, which moves into the next bias. Then the zeros that are left become "
        "small noise, train again, and the next cycle begins."
    )


def _sizes(m: Measured) -> Section:
    return Section(
        "Accuracy against size",
        [
            f"Every cycle halves the weights that remain, ranked by the units they connect, so "
            f"that whole units empty. After {m.last.number} cycles {m.last.parameters:,} of "
            f"{m.result.dense.parameters:,} parameters are left. Each rewrite was checked in "
            f"float64 against the masked network: the largest difference was {m.error:.0e} of the "
            "output's scale.",
        ],
        [
            Figure(_figure(m), "Accuracy on the test digits after each cycle, by parameters."),
            _table(m),
        ],
    )


def _speed(m: Measured) -> Section:
    rows = [
        [
            f"batch {timing.batch}",
            f"{1e6 * timing.best[_FULL]:,.0f} us",
            f"{1e6 * timing.best[_SMALL]:,.0f} us",
            ratio(timing.speedup(_SMALL)),
        ]
        for timing in m.timings
    ]
    return Section(
        "Latency before and after",
        [
            "A masked network takes the time of the dense one: its tensors have the same size. The "
            "minimized network is plain torch; no sparse kernel is involved. At batch 1 the calls "
            "themselves take most of the time.",
        ],
        [Table(["forward pass", "full size", "minimized", "speed-up"], rows)],
    )


def _figure(m: Measured) -> str:
    sizes = [point.parameters for point in m.points]
    accuracies = [100 * point.metric for point in m.points]
    with plots.style():
        figure, (ax,) = plots.panels(1, width=7.2, height=3.0)
        ax.plot(sizes, accuracies, color=plots.SERIES[1], marker="o")
        for point, size, value in zip(m.points, sizes, accuracies, strict=True):
            name = f"cycle {point.number}" if point.number else "dense"
            ax.annotate(name, (size, value), textcoords="offset points", xytext=(0, 8), ha="center")
        margin = 0.25 * (max(accuracies) - min(accuracies)) + 0.3
        ax.set(
            title="Test accuracy, %",
            xlabel="parameters",
            xscale="log",
            xlim=(0.6 * min(sizes), 1.7 * max(sizes)),
            ylim=(min(accuracies) - margin, max(accuracies) + 2 * margin),
        )
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        return plots.svg(figure, "test accuracy against the number of parameters, by cycle")


def _table(m: Measured) -> Table:
    first = m.result.dense.parameters
    rows = [
        [
            f"cycle {point.number}" if point.number else "dense",
            f"{point.parameters:,}",
            f"{first / point.parameters:.1f}x",
            f"{100 * point.sparsity:.0f} %",
            f"{100 * point.metric:.2f} %",
        ]
        for point in m.points
    ]
    return Table(["network", "parameters", "smaller", "zeros inside", "accuracy"], rows)


def _faster(m: Measured) -> str:
    gains = [f"{ratio(t.speedup(_SMALL))} at batch {t.batch}" for t in m.timings]
    return f"As fast as the full size: {', '.join(gains)}."


def _data(m: Measured) -> dict[str, Any]:
    return {
        **m.result.to_dict(),
        "times_smaller": m.times_smaller,
        "max_error": m.error,
        "timings": [asdict(timing) for timing in m.timings],
    }
