"""``sapwood info``: versions, what was compiled, what this machine offers, and a self-test."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sapwood.cli import console, environment

if TYPE_CHECKING:
    from sapwood._selftest import Result


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for bug reports.")] = False,
) -> None:
    """Report on this installation and test it."""
    from sapwood import _selftest

    facts = environment.describe()
    results = [] if facts["ops_error"] else _selftest.run()
    healthy = facts["ops_error"] is None and all(result.passed for result in results)
    if as_json:
        tests = [asdict(result) for result in results]
        console.print_json({**facts, "self_test": tests, "healthy": healthy})
    else:
        _print_report(facts, results)
    if not healthy:
        raise typer.Exit(1)


def _print_report(facts: dict[str, Any], results: list[Result]) -> None:
    out = console.stdout()
    for name, value in _lines(facts):
        _print_fact(out, name, value)
    out.print()
    if facts["ops_error"]:
        out.print("[bold red]BROKEN[/]  the compiled library is unusable, no op can run:")
        wrapped = textwrap.indent(textwrap.fill(facts["ops_error"], out.width - 10), " " * 8)
        out.print(wrapped, markup=False)
        return
    for result in results:
        mark = "[green]PASS[/]" if result.passed else "[bold red]FAIL[/]"
        out.print(f"{mark}  {result.family:<15} {result.seconds * 1e3:6.1f} ms")
        detail = textwrap.fill(result.detail, out.width - 8)
        out.print(textwrap.indent(detail, " " * 6), style="dim", markup=False)


def _print_fact(out: Console, name: str, value: str) -> None:
    indent = " " * 12
    text = textwrap.fill(value, out.width - 1, initial_indent=indent, subsequent_indent=indent)
    out.print(f"[dim]{name:<12}[/]", end="")
    out.print(text[len(indent) :], markup=False)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = facts["cpu"]
    limit = cpu["capability_limit"]
    bound = f" (SAPWOOD_CPU_CAPABILITY={limit})" if limit else ""
    gpus = [f"{gpu['name']} ({gpu['arch']}): {gpu['code']}" for gpu in facts["gpus"]]
    return [
        ("sapwood", facts["sapwood"]),
        ("python", f"{facts['python']} on {facts['system']}"),
        ("torch", facts["torch"]),
        ("numpy", facts["numpy"] or "not installed"),
        ("triton", facts["triton"] or "not installed (needed only for Triton kernels on a GPU)"),
        ("compiled", _build_line(facts["build"])),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in use"),
        ("kernels", f"{cpu['capability']}{bound}; found {' '.join(cpu['features']) or 'nothing'}"),
        ("GPU", "; ".join(gpus) or "none that torch can see"),
    ]


def _build_line(build: dict[str, Any] | None) -> str:
    if build is None:
        return "unknown: the module _native is missing; features that need it will raise"
    cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "without CUDA"
    return f"{build['compiler']}, torch {build['torch_headers']} headers, {cuda}"
