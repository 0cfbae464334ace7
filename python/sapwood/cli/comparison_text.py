"""A comparison as text: the table of the terminal and the sentences below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from sapwood.cli import methods
from sapwood.cli.comparison import Result, Row

COLUMNS = 4  # sparsities side by side in 80 columns


def percent(share: float) -> str:
    """A sparsity without needless digits.

    >>> percent(0.9), percent(0.8926)
    ('90 %', '89.26 %')
    """
    return f"{100 * share:.6g} %"


def number(share: float) -> str:
    """An accuracy in percent, five characters wide at most.

    >>> number(0.97754), number(1.0)
    ('97.75', '100.0')
    """
    return f"{100 * share:.2f}" if share < 0.99995 else "100.0"


def gap(share: float) -> str:
    """A signed difference in points, five characters wide at most.

    >>> gap(-0.0059), gap(-0.4861)
    ('-0.59', '-48.6')
    """
    return f"{100 * share:+.2f}" if abs(share) < 0.09995 else f"{100 * share:+.1f}"


def cost(result: Result, rows: Sequence[Row]) -> str:
    """Trainings of the dense network that a method costs, from its lowest sparsity to its highest.

    A training that methods share is counted for each of them.
    """
    full = result.dense.epochs
    values = [f"{row.epochs / full:.3g}" for row in rows]
    return values[0] if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def tables(result: Result) -> list[Table]:
    """Methods by sparsity, four sparsities to a table."""
    sparsities = result.request.sparsities
    parts = [sparsities[i : i + COLUMNS] for i in range(0, len(sparsities), COLUMNS)]
    return [_table(result, part) for part in parts]


def _table(result: Result, sparsities: Sequence[float]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", header_style="dim", no_wrap=True)
    table.add_column("cost", header_style="dim", justify="right", no_wrap=True)
    for sparsity in sparsities:
        table.add_column(percent(sparsity), header_style="dim", justify="right", no_wrap=True)
    for method, rows in by_method(result).items():
        shown = [row for row in rows if row.sparsity in sparsities]
        table.add_row(method, cost(result, rows), *(_cell(row) for row in shown))
    return table


def _cell(row: Row) -> str:
    """Mean and gap; below it the range, where there is one."""
    text = f"{number(row.mean)} {gap(row.gap)}"
    if row.seeds == 1:
        return text
    return f"{text}\n[dim]{number(row.lowest)}-{number(row.highest)}[/]"


def by_method(result: Result) -> dict[str, list[Row]]:
    """The rows of each method, in the order asked for."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        found.setdefault(row.method, []).append(row)
    return found


def title(result: Result) -> str:
    """What the table shows."""
    dense = result.dense
    if dense.seeds == 1:
        return f"Test accuracy in %, and the gap to dense ({number(dense.mean)})"
    spread = f"{number(dense.mean)}, {number(dense.lowest)}-{number(dense.highest)}"
    return f"Test accuracy in %: mean of {dense.seeds} seeds, gap to dense ({spread}), range"


def remarks(result: Result) -> list[str]:
    """What the table does not say itself: costs, chance, and whether all masks are exact."""
    methods = [f"{name}: {what}." for name, what in method_remarks(result).items()]
    return [cost_unit(result), *methods, *chance(result), *exactness(result)]


def cost_unit(result: Result) -> str:
    """What the column of costs counts."""
    return f"Cost in trainings of {result.request.recipe(0).epochs} epochs."


def method_remarks(result: Result) -> dict[str, str]:
    """The methods whose names leave open what was done."""
    recipe = result.request.recipe(0)
    known = {
        "one-shot": "the dense network, cut, without training after the cut",
        "finetune": f"the dense network, cut, then {recipe.finetune_epochs} epochs from "
        f"{methods.FINETUNE_LR:g} of the learning rate",
    }
    asked = {variant.method for variant in result.request.variants}
    return {name: what for name, what in known.items() if name in asked}


def chance(result: Result) -> list[str]:
    """How large a difference has to be to mean something."""
    images = result.records[0]["test_images"]
    lines = [f"One of the {images} test images is {100 / images:.2g} points."]
    if result.dense.seeds == 1:
        lines.append("There was one seed: another would move every figure by a few images.")
    return lines


def exactness(result: Result) -> list[str]:
    """Whether the masks are what they should be."""
    faults = result.faults
    if faults:
        return [f"MISMATCH in {fault}" for fault in faults]
    masked = [record for record in result.records if record["masks_digest"] is not None]
    watched = sum(record["left_zero_after_last_update"] is not None for record in masked)
    return [
        f"In all {len(masked)} pruned networks the number of zeros is exact, and masks and weights "
        f"agree; in the {watched} watched ones no masked weight left zero after the last change of "
        "the masks."
    ]
