"""``sapwood tour``: prune, pack and run a real network, and show what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapwood.cli import console

if TYPE_CHECKING:
    from sapwood.cli.chapters import ChapterResult

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}
SCHEMA = "sapwood.tour/1"


def tour(
    out: Annotated[Path, typer.Option(help="Folder for the page and the figures.")] = Path(
        "sapwood-tour"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller network: under a minute.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and order of the data.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1)
    ] = None,
) -> None:
    """Prune, pack and run a real network; write a page about it."""
    console.require("tour", NEEDS)
    console.require_ops()
    import torch

    from sapwood.cli import chapters

    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    try:
        with console.bars() as bars:
            context = chapters.Context(quick=quick, seed=seed, bars=bars)
            results = {name: chapter.run(context) for name, chapter in chapters.load()}
        target = _write(out, results, quick=quick, seed=seed)
    except KeyboardInterrupt:
        console.fail("interrupted; nothing was written", console.INTERRUPTED)
    except OSError as error:
        console.fail(f"cannot write to {out}: {error.strerror or error}", console.BAD_ARGUMENTS)
    for result in results.values():
        _print(result)
    seconds = time.perf_counter() - start
    console.stdout().print(f"wrote {target} ({seconds:.0f} s)", markup=False, soft_wrap=True)


def _write(out: Path, results: dict[str, ChapterResult], *, quick: bool, seed: int) -> Path:
    """Writes the page and the figures behind it; both or neither."""
    from sapwood._files import atomic_write_text, staged
    from sapwood.cli import environment
    from sapwood.report import render

    facts = environment.describe()
    page = _page(list(results.values()), facts, quick=quick, seed=seed)
    data: dict[str, Any] = {"schema": SCHEMA, "quick": quick, "seed": seed, "environment": facts}
    data["chapters"] = {name: result.data for name, result in results.items()}
    with staged(out) as stage:
        atomic_write_text(stage / "index.html", render(page))
        atomic_write_text(stage / "results.json", json.dumps(data, indent=2) + "\n")
    return out / "index.html"


def _page(
    results: Sequence[ChapterResult], facts: dict[str, Any], *, quick: bool, seed: int
) -> Any:
    from sapwood.report import Page

    cpu = facts["cpu"]
    threads = f"{cpu['threads']} thread{'s' if cpu['threads'] != 1 else ''}"
    measured = [
        ("Processor", f"{cpu['model']}, {cpu['cores']} cores"),
        ("Threads", threads),
        ("Kernels", f"{cpu['capability']}, float32"),
        ("Versions", f"sapwood {facts['sapwood']}, torch {facts['torch']}"),
        ("Seed", f"{seed}{', quick run' if quick else ''}"),
    ]
    for result in results:
        measured.extend(result.facts)
    return Page(
        title="sapwood tour",
        headline=results[0].headline,
        subtitle=f"Trained, pruned, packed and timed on this machine: {cpu['model']}, {threads}. "
        "Every figure below was measured in this one run.",
        stats=[stat for result in results for stat in result.stats],
        chapters=[result.page for result in results],
        facts=measured,
    )


def _print(result: ChapterResult) -> None:
    out = console.stdout()
    summary = result.summary
    out.print()
    out.print(console.table(result.page.title, summary.columns, summary.rows))
    for remark in result.remarks:
        out.print(remark, markup=False)
    out.print()
