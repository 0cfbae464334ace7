"""The table of a family's benchmark: every op and peer of its quick or full sweep."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sapwood.cli.benchmarks.runner import run_case

if TYPE_CHECKING:
    from rich.console import Console


def measure_family(family: str, *, quick: bool = False) -> dict[str, Any]:
    """Times all cases of a family with their peers; returns what ``--json`` prints.

    Args:
        family: one with a module in this package.
        quick: the quick sweep, and fewer rounds.
    """
    import torch

    import sapwood
    from sapwood._measure import machine_name

    rows = []
    module = importlib.import_module(f"sapwood.cli.benchmarks.{family}")
    for case in module.cases(quick=quick):
        result = run_case(case, rounds=3 if quick else 7, seconds=0.1 if quick else 0.3)
        base = result.timings[case.baseline].fastest_us
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "baseline": case.baseline,
                "baseline_us": base,
                "speedup": {
                    name: base / t.fastest_us
                    for name, t in result.timings.items()
                    if name != case.baseline
                },
                "unavailable": result.unavailable,
            }
        )
    return {
        "family": family,
        "sapwood": sapwood.__version__,
        "torch": torch.__version__,
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "rows": rows,
    }


def show_family(report: dict[str, Any], console: Console) -> None:
    """Prints the report within 80 columns: one line per case and provider."""
    from rich.table import Table

    table = Table(
        title=f"{report['family']}: speed-up over the baseline of each case",
        caption="fastest of interleaved rounds",
    )
    for column in ("op", "case", "provider", "speed-up"):
        table.add_column(column, justify="right" if column == "speed-up" else "left")
    for row in report["rows"]:
        milliseconds = row["baseline_us"] / 1e3
        table.add_section()
        table.add_row(row["op"], row["case"], row["baseline"], f"{milliseconds:.2f} ms")
        for name, speedup in row["speedup"].items():
            table.add_row("", "", name, f"{speedup:.2f}x")
    console.print(table)
    console.print(f"{report['machine']}, torch {report['torch']}", highlight=False)
    for reason in sorted({r for row in report["rows"] for r in row["unavailable"].values()}):
        console.print(f"not timed: {reason}", highlight=False)
