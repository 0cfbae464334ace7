"""Chapter 1: a network for handwritten digits, pruned, packed, and timed against dense."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sapwood import data
from sapwood.cli import packing, tasks, training
from sapwood.cli.chapters import ChapterResult, Context, _figures
from sapwood.cli.methods import Recipe
from sapwood.cli.packing import Packed, Timing
from sapwood.cli.training import Run
from sapwood.pruning import Progress
from sapwood.report.page import Chapter, Figure, Section, Stat, Table

TITLE = "Prune, pack, run"
SPARSITIES = (0.9, 0.95)


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    digits: data.Dataset
    runs: dict[str, Run]  # "dense", "90 %", "95 %"
    traces: dict[str, list[tuple[int, float]]]  # (step, sparsity after that step)
    packed: dict[str, Packed]  # without "dense"
    timings: list[Timing]

    @property
    def sparsest(self) -> str:
        return list(self.packed)[-1]

    @property
    def best(self) -> Timing:
        """The batch size at which the sparsest network gains most, if possible undisturbed."""
        timings = list(filter(packing.quiet, self.timings)) or self.timings
        return max(timings, key=lambda timing: timing.speedup(self.sparsest))


def run(context: Context) -> ChapterResult:
    """Trains, prunes, packs, checks and times; a minute, or three without ``quick``."""
    measured = _measure(context)
    return ChapterResult(
        page=Chapter(TITLE, _lead(measured), _sections(measured)),
        headline=_headline(measured),
        stats=_stats(measured),
        summary=_summary(measured),
        remarks=_remarks(measured),
        facts=[
            ("Timing", "whole forward passes, networks in turns, shortest of many rounds"),
            ("Training", "on one thread, so that its outcome depends on the seed alone"),
            ("Data", measured.digits.source),
        ],
        data=_data(measured),
    )


def _measure(context: Context) -> Measured:
    width, epochs = (1024, 12) if context.quick else (2048, 20)
    digits = data.load_digits()
    dense = Recipe(
        "dense",
        0.0,
        epochs=epochs,
        lr=0.2,
        weight_decay=1e-3,
        batch_size=64,
        seed=context.seed,
        scope="erk",
    )
    recipes = [dense, *(replace(dense, method="progressive", sparsity=s) for s in SPARSITIES)]
    runs, traces = {}, {}
    for recipe in recipes:
        label = f"{100 * recipe.sparsity:.0f} %" if recipe.sparsity else "dense"
        runs[label], traces[label] = _train(label, recipe, digits, width, context)
    packed = {
        label: packing.pack(run.model, digits.test_inputs)
        for label, run in runs.items()
        if run.masks is not None
    }
    networks = {"dense": runs["dense"].model, **{label: p.model for label, p in packed.items()}}
    seconds = 0.5 if context.quick else 2.0
    timings = packing.time_models(networks, digits.test_inputs, context.bars, seconds=seconds)
    return Measured(digits, runs, traces, packed, timings)


def _train(
    label: str, recipe: Recipe, digits: data.Dataset, width: int, context: Context
) -> tuple[Run, list[tuple[int, float]]]:
    """A trained network, and how its sparsity rose."""
    trace = [(0, 0.0)]
    context.bars.start(_name(label))

    def observe(now: Progress) -> None:
        trace.append((now.step, now.sparsity))
        note = f"loss {now.loss:6.3f}  sparsity {now.sparsity:6.1%}"
        context.bars.step(now.step, now.total, note)

    model = tasks.perceptron((width, width), digits, recipe.seed)
    [run] = training.train(recipe, digits, model, observers=[observe])
    return run, trace


def _headline(m: Measured) -> str:
    sparse, dense = m.runs[m.sparsest], m.runs["dense"]
    accuracy = (
        f"Without {m.sparsest} of its weights the network reads {_percent(sparse.accuracy)} "
        f"of the digits (dense: {_percent(dense.accuracy)})"
    )
    speed = m.best.speedup(m.sparsest)
    if not packing.quiet(m.best):
        return f"{accuracy}. The processor was too busy to say how much faster it runs."
    if speed < 1 + packing.SAME:
        return f"{accuracy}, but packed it is no faster than dense on this processor."
    return f"{accuracy} and runs {packing.ratio(speed)} as fast at batch {m.best.batch}."


def _lead(m: Measured) -> str:
    weights = sum(
        layer.report.shape[0] * layer.report.shape[1] for layer in m.packed[m.sparsest].layers
    )
    return (
        f"A network with {weights / 1e6:.1f} million weights learns handwritten digits three "
        "times: dense, and while 90 and 95 % of its weights are switched off. Then the pruned "
        "ones are packed and raced against the dense one."
    )


def _stats(m: Measured) -> list[Stat]:
    gain, worst = m.best.speedup(m.sparsest), max(p.max_difference for p in m.packed.values())
    rough = "" if packing.quiet(m.best) else "rough "
    return [
        Stat(_percent(m.runs["dense"].accuracy), "of the test digits read right, dense"),
        Stat(_percent(m.runs[m.sparsest].accuracy), f"read right at {m.sparsest} sparsity"),
        Stat(
            packing.ratio(gain),
            f"{rough}speed of the {m.sparsest} network, packed, at batch {m.best.batch}",
        ),
        Stat(
            f"{worst:.0e}" if worst else "0", "largest difference between packed and masked outputs"
        ),
    ]


def _sections(m: Measured) -> list[Section]:
    return [_prune_section(m), _pack_section(m), _run_section(m)]


def _prune_section(m: Measured) -> Section:
    n, epochs = len(m.digits.test_labels), m.runs["dense"].recipe.epochs
    rows = [
        [
            _name(label),
            _percent(run.accuracy),
            str(run.wrong),
            f"{100 * run.zeros:.2f} %" if run.masks else "-",
            f"{run.seconds:.1f} s",
        ]
        for label, run in m.runs.items()
    ]
    curves = [
        _figures.Curve(
            _name(label),
            [step for step, _ in m.traces[label]],
            [sparsity for _, sparsity in m.traces[label]],
            [int(row["epoch"]) for row in run.history],
            [row["metric"] for row in run.history],
        )
        for label, run in m.runs.items()
    ]
    return Section(
        "Prune",
        [
            "All three networks start from the same weights and see the same batches for "
            f"{epochs} epochs. Progressive magnitude pruning switches off the smallest weights, a "
            "few at a time, until three quarters of the training are over; in the rest of the "
            "time the network recovers. No second training run is needed. Small layers keep a "
            "larger share of their weights (Erdos-Renyi densities).",
        ],
        [
            Figure(
                _figures.training(curves),
                "Left: how many weights are off. Right: accuracy on the "
                f"{n} test digits after each epoch; one digit is {100 / n:.2f} points, so "
                "differences of a few tenths are chance.",
            ),
            Table(["network", "test accuracy", f"wrong of {n}", "zeros", "training"], rows),
        ],
    )


def _pack_section(m: Measured) -> Section:
    rows = [
        [
            f"{_name(label)}, layer {index}",
            " x ".join(map(str, layer.report.shape)),
            f"{layer.report.sparsity:.1%}",
            *(layer.formats[batch] for batch in packing.BATCHES),
        ]
        for label, packed in m.packed.items()
        for index, layer in enumerate(packed.layers, start=1)
    ]
    weights = {
        label: [layer.weight.detach() for layer in _linear_layers(m.runs[label])]
        for label in m.packed
    }
    svg = _figures.survivors(
        m.digits.train_inputs,
        {label: layers[0] != 0 for label, layers in weights.items()},
        {label: layers[1] != 0 for label, layers in weights.items()},
    )
    return Section(
        "Pack",
        [
            "A packed weight stores only what is left. For each layer and batch size a measured "
            "cost model picks the format that runs, and dense torch where that is faster: packing "
            "should never cost time.",
            *(_agreement(label, packed) for label, packed in m.packed.items()),
        ],
        [
            Figure(
                svg,
                f"What survives. {_pixels(m)} The dots are the weights left in a 64 x 64 corner "
                "of the middle layer.",
            ),
            Table(
                ["layer", "shape", "zeros", *(f"batch {b}" for b in packing.BATCHES)],
                rows,
                "The format that runs, by batch size.",
            ),
        ],
    )


def _linear_layers(run: Run) -> list[nn.Linear]:
    return [layer for layer in run.model.modules() if isinstance(layer, nn.Linear)]


def _pixels(m: Measured) -> str:
    """What the masks of the first layer say about the input, in one or two sentences."""
    first = _linear_layers(m.runs[m.sparsest])[0]
    empty = m.digits.train_inputs.sum(0) == 0  # (features,)
    kept = first.weight.detach()[:, empty].count_nonzero()
    return (
        "The images show the input pixels: the mean digit, then the share of first-layer weights "
        f"that each pixel keeps. {int(empty.sum())} pixels are empty in every training image; at "
        f"{m.sparsest} they keep {int(kept)} of their {first.out_features * int(empty.sum())} "
        "weights."
    )


def _agreement(label: str, packed: Packed) -> str:
    same = f"{packed.same_predictions} of {packed.predictions} predictions are the same"
    return (
        f"At {label}: packed and masked outputs differ by at most {packed.max_difference:.1e} "
        f"(the largest output is {packed.largest_output:.1f}), {same}, and the weights take "
        f"{packed.bytes_packed / 1e6:.1f} MB instead of {packed.bytes_dense / 1e6:.1f} MB."
    )


def _run_section(m: Measured) -> Section:
    labels = {"dense": "dense", **{label: label for label in m.packed}}
    paragraphs = [
        "The same forward passes, dense through torch's own linear layers and packed through "
        "sapwood. The networks take turns, so that a busy machine slows them alike.",
        *_remarks(m),
    ]
    rows = [
        [
            f"batch {timing.batch}",
            _duration(timing.best["dense"]),
            *(
                text
                for label in m.packed
                for text in (_duration(timing.best[label]), packing.ratio(timing.speedup(label)))
            ),
        ]
        for timing in m.timings
    ]
    heads = [text for label in m.packed for text in (f"{label} packed", "speed-up")]
    return Section(
        "Run",
        paragraphs,
        [
            Figure(
                _figures.speed(m.timings, labels),
                "Time of one forward pass, shorter is better; at the right the speed-up over "
                "dense. Each panel has its own scale.",
            ),
            Table(["", "dense", *heads], rows),
        ],
    )


def _remarks(m: Measured) -> list[str]:
    return packing.remarks(m.timings, list(m.packed))


def _summary(m: Measured) -> Table:
    columns = ["network", "accuracy", "zeros", *(f"batch {t.batch}" for t in m.timings)]
    rows = []
    for label, run in m.runs.items():
        zeros = f"{100 * run.zeros:.1f} %" if run.masks else "-"
        cells = [_cell(timing, label) for timing in m.timings]
        rows.append([_name(label), _percent(run.accuracy), zeros, *cells])
    return Table(columns, rows)


def _cell(timing: Timing, label: str) -> str:
    time = _duration(timing.best[label])
    return time if label == "dense" else f"{time} {packing.ratio(timing.speedup(label)):>5}"


def _name(label: str) -> str:
    return label if label == "dense" else f"{label} sparse"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _data(m: Measured) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    for label, run in m.runs.items():
        networks[label] = training.as_data(run)
        if label in m.packed:
            networks[label]["packed"] = packing.as_data(m.packed[label], m.timings, label)
    return {"title": TITLE, "data": m.digits.source, "networks": networks}
