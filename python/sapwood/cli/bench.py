"""``sapwood bench FAMILY``: how fast the packed formats are on this machine, against torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sapwood.cli.benchmarks.runner import CaseResult

#: Families with a table in this command; ``pytest bench`` times all of them.
TABLES = ("masked_matmul",)
BATCHES = (1, 16, 64, 256)
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
PACKED = ("bitmap", "csr", "sell")
NOISY = 0.25  # median excess of the dense times over the fastest one
PEERS = {"dense": (), "torch": ("torch_csr",), "scipy": ("scipy",), "all": ("torch_csr", "scipy")}


def bench(
    family: Annotated[str, typer.Argument(help=f"One of: {', '.join(TABLES)}.")],
    vs: Annotated[
        str, typer.Option(help="Peers beside dense torch: dense, torch, scipy or all.")
    ] = "torch",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    size: Annotated[int, typer.Option(min=16, max=16384, help="Side of the square weight.")] = 2048,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time packed sparse products against dense torch on this machine."""
    if family not in TABLES:
        raise typer.BadParameter(
            f"{family!r} is not one of {', '.join(TABLES)}", param_hint="FAMILY"
        )
    if vs not in PEERS:
        raise typer.BadParameter(f"{vs!r} is not one of {', '.join(PEERS)}", param_hint="--vs")
    import torch
    from rich.console import Console

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = measure(size, PEERS[vs], quick=quick, progress=None if as_json else Console())
    finally:
        torch.set_num_threads(before)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report, Console())


def measure(
    size: int, peers: Sequence[str], *, quick: bool = False, progress: Console | None = None
) -> dict[str, Any]:
    """Times a size x size weight over sparsities and batches; returns what ``--json`` prints.

    Args:
        size: N = K of the weight.
        peers: further providers to time.
        quick: three sparsities, three batches and fewer rounds.
        progress: where to show a progress bar, if anywhere.
    """
    import torch
    from rich.progress import track

    import sapwood
    from sapwood._measure import machine_name
    from sapwood.cli.benchmarks.masked_matmul import MaskedMatmulCase
    from sapwood.cli.benchmarks.runner import run_case

    batches = (1, 64, 256) if quick else BATCHES
    sparsities = (0.5, 0.8, 0.95) if quick else SPARSITIES
    points = [(batch, sparsity) for batch in batches for sparsity in sparsities]
    if progress is not None and progress.is_terminal:
        steps = track(points, "timing", console=progress, transient=True)
    else:
        steps = iter(points)
    rows = []
    for batch, sparsity in steps:
        case = MaskedMatmulCase("packed_linear", size, size, batch, sparsity)
        result = run_case(
            case,
            ("sapwood", *PACKED, *peers),
            rounds=5 if quick else 7,
            seconds=0.1 if quick else 0.3,
        )
        rows.append(_row(case.batch, case.sparsity, result))
    return {
        "family": "masked_matmul",
        "sapwood": sapwood.__version__,
        "torch": torch.__version__,
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "size": size,
        "rows": rows,
        "crossover": {str(batch): _crossover(rows, batch) for batch in batches},
    }


def _row(batch: int, sparsity: float, result: CaseResult) -> dict[str, Any]:
    """The fastest rounds are compared: what other programs add to a time is not ours to report."""
    timings = result.timings
    dense = timings["dense"]
    return {
        "batch": batch,
        "sparsity": sparsity,
        "dense_us": dense.fastest_us,
        "noise": dense.median_us / dense.fastest_us - 1,
        "speedup": {
            name: dense.fastest_us / t.fastest_us for name, t in timings.items() if name != "dense"
        },
        "unavailable": result.unavailable,
    }


def _crossover(rows: Sequence[dict[str, Any]], batch: int) -> float | None:
    """Sparsity above which a packed format beats dense, interpolated between measured points.

    None where no measured sparsity does; the lowest one where all do.
    """
    curve = sorted(
        (row["sparsity"], max(row["speedup"].get(name, 0.0) for name in PACKED))
        for row in rows
        if row["batch"] == batch
    )
    slower = [point for point in curve if point[1] < 1.0]
    if not slower:
        return float(curve[0][0])
    s0, v0 = slower[-1]
    faster = [point for point in curve if point[0] > s0]
    if not faster:
        return None
    s1, v1 = faster[0]
    return float(s0 + (1.0 - v0) / (v1 - v0) * (s1 - s0))


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the report within 80 columns."""
    from rich.table import Table

    table = Table(
        title=f"Speed-up over dense torch, {report['size']} x {report['size']} float32 weight, "
        "random mask",
        caption="sapwood: the format chosen automatically; dense where nothing is faster\n"
        "fastest of interleaved rounds, bias and layout changes included",
    )
    peers = [
        name
        for name in ("sapwood", *PACKED, "torch_csr", "scipy")
        if any(name in row["speedup"] for row in report["rows"])
    ]
    for column in ("batch", "sparsity", "dense us", *peers):
        table.add_column(column, justify="right")
    last = None
    for row in report["rows"]:
        if last not in (None, row["batch"]):
            table.add_section()
        cells = [_speedup(row["speedup"].get(name)) for name in peers]
        shown = str(row["batch"]) if last != row["batch"] else ""
        table.add_row(shown, f"{row['sparsity']:.0%}", f"{row['dense_us']:.0f}", *cells)
        last = row["batch"]
    console.print(table)
    console.print(f"{report['machine']}, torch {report['torch']}", highlight=False)
    lowest = min(row["sparsity"] for row in report["rows"])
    for batch, crossover in report["crossover"].items():
        console.print(f"batch {batch:>4}: {_sentence(crossover, lowest)}", highlight=False)
    noise = statistics.median(row["noise"] for row in report["rows"])
    if noise > NOISY:
        console.print(
            f"The machine was busy: times varied by {noise:.0%}. Repeat when it is quiet.",
            style="yellow",
            highlight=False,
        )


def _speedup(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _sentence(crossover: float | None, lowest: float) -> str:
    if crossover is None:
        return "dense torch is faster at every sparsity measured here"
    if crossover <= lowest:
        return f"faster than dense from {lowest:.0%} sparsity here, the lowest measured"
    return f"faster than dense above {crossover:.0%} sparsity here"
