"""A comparison as a drawing, as a page, and as files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

from sapwood._files import atomic_write_text, staged
from sapwood.cli import comparison, environment
from sapwood.cli import comparison_text as text
from sapwood.cli.choices import METHODS, Variant
from sapwood.cli.comparison import Result, Row
from sapwood.report import Figure, Page, Section, Table, charts, plots, render
from sapwood.report.page import Chapter

_FAR = 0.05  # a gap to dense from which a close-up helps


def save(out: Path, result: Result) -> list[str]:
    """Writes table, report, plot and page, or none; returns their names."""
    files = {
        "index.html": render(page(result)),
        "plot.svg": drawing(result, inline=False),
        "report.json": json.dumps(comparison.as_data(result), indent=1) + "\n",
        "table.csv": result.csv(),
    }
    with staged(out) as stage:
        for name, content in files.items():
            atomic_write_text(stage / name, content)
    return list(files)


def drawing(result: Result, *, inline: bool) -> str:
    """Accuracy over sparsity as SVG, for a page or as a file."""
    described = (
        f"test accuracy of {len(text.by_method(result))} methods over sparsity, "
        f"dense: {text.number(result.dense.mean)} %"
    )
    with plots.style():
        lines = [_curve(name, rows) for name, rows in text.by_method(result).items()]
        figure = charts.curves(lines, _frame(result))
        return (plots.svg if inline else plots.standalone)(figure, described)


def _curve(name: str, rows: list[Row]) -> charts.Curve:
    return charts.Curve(
        name,
        [place(row.sparsity) for row in rows],
        [100 * row.mean for row in rows],
        [100 * row.lowest for row in rows],
        [100 * row.highest for row in rows],
    )


def place(sparsity: float) -> float:
    """Equal steps divide the weights that are left by equal factors.

    >>> round(place(0.99) - place(0.9), 6)
    1.0
    """
    return -math.log10(1 - sparsity)


def _frame(result: Result) -> charts.Frame:
    dense = 100 * result.dense.mean
    means = [row.mean for row in result.rows]
    far = min(means, default=1.0) < result.dense.mean - _FAR
    # half of all points are in the close-up
    bottom = min(100 * median(means), dense - 1) - 0.3 if far else None
    return charts.Frame(
        title="Test accuracy, %",
        x_label="sparsity",
        ticks=[(place(s), text.percent(s)) for s in result.request.sparsities],
        reference=(dense, "dense"),
        close_up=bottom,
    )


def page(result: Result) -> Page:
    """The whole comparison as a page."""
    request, facts = result.request, environment.describe()
    recipe, cpu = request.recipe(0), facts["cpu"]
    seeds = ", ".join(map(str, request.seeds))
    training = (
        f"SGD, learning rate {recipe.lr:g} (cosine), momentum 0.9, weight decay "
        f"{recipe.weight_decay:g}, batch {recipe.batch_size}, {recipe.epochs} epochs"
    )
    return Page(
        title="sapwood compare",
        headline=headline(result),
        subtitle=f"{request.network} on {result.source}. All networks of a seed start from the "
        "same weights and see the same batches; they differ in how weights are switched off.",
        chapters=[Chapter("Ways to prune", lead(result), sections(result))],
        facts=[
            ("Training", training),
            ("Masks", f"final after {recipe.t1:g} of the steps, cuts every {recipe.every} steps"),
            ("Seeds", seeds),
            ("Processor", f"{cpu['model']}, one thread per run"),
            ("Versions", f"sapwood {facts['sapwood']}, torch {facts['torch']}"),
        ],
    )


def headline(result: Result) -> str:
    """One sentence on the highest sparsity, with the figures and what they cost."""
    highest = result.request.sparsities[-1]
    rows = [row for row in result.rows if row.sparsity == highest]
    dense = f"{text.number(result.dense.mean)} %"
    if not rows:
        return f"Dense: {dense} of the test images right."
    best = max(rows, key=lambda row: row.mean)
    price = (
        f" in {text.cost(result, [best])} trainings" if best.epochs > result.dense.epochs else ""
    )
    return (
        f"At {text.percent(highest)} sparsity {best.method} is most accurate: "
        f"{text.number(best.mean)} %{price}; dense {dense}."
    )


def lead(result: Result) -> str:
    """What was done."""
    names = list(text.by_method(result))
    runs = len(result.records)
    return (
        f"{len(names)} methods, {len(result.request.sparsities)} sparsities, "
        f"{len(result.request.seeds)} seeds: {runs} networks under one recipe."
    )


def sections(result: Result) -> list[Section]:
    """Plot, table, and what the methods do."""
    return [
        Section(
            "Accuracy",
            [" ".join(text.chance(result)), " ".join(text.exactness(result))],
            [Figure(drawing(result, inline=True), _caption(result)), _table(result)],
        ),
        Section("Methods", [], [_methods(result)]),
    ]


def _caption(result: Result) -> str:
    seeds = len(result.request.seeds)
    shown = (
        f"Mean of {seeds} seeds; thin lines reach from the lowest to the highest. "
        if seeds > 1
        else ""
    )
    return f"{shown}Steps along the axis divide the weights that are left by equal factors."


def _table(result: Result) -> Table:
    sparsities = [text.percent(s) for s in result.request.sparsities]
    rows = [
        [name, text.cost(result, rows), *(_cell(row) for row in rows)]
        for name, rows in text.by_method(result).items()
    ]
    caption = f"{text.title(result)}. {text.cost_unit(result)}"
    return Table(["method", "cost", *sparsities], rows, caption)


def _cell(row: Row) -> str:
    """Mean and gap; in a second line the range, where there is one."""
    spread = f"\n{text.number(row.lowest)}-{text.number(row.highest)}" if row.seeds > 1 else ""
    return f"{text.number(row.mean)} {text.gap(row.gap)}{spread}"


def _methods(result: Result) -> Table:
    own = text.method_remarks(result)
    rows = [
        [str(variant), own.get(variant.method, _what(variant))]
        for variant in result.request.variants
    ]
    return Table(["method", "what it does"], rows, prose=True)


def _what(variant: Variant) -> str:
    summary = METHODS[variant.method].summary
    if variant.like is not None:
        return f"{summary}; as many weights per layer as {variant.like} has"
    own = METHODS[variant.method].scopes[0]
    scopes = {
        "global": "all weights compete",
        "layer": "the same share in every layer",
        "erk": "Erdos-Renyi densities: thin layers stay denser",
    }
    return summary if variant.scope == own else f"{summary}; {scopes[variant.scope]}"
