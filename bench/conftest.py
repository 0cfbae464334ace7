"""Runs benchmarks: ``pytest bench`` is the quick sweep, ``pytest bench --full`` the whole one.

Absolute times drift on shared machines, so what counts is the interleaved ratio: all providers of a
case run once per round, in random order, and each is divided by the baseline of the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import history
import peak_memory
import pytest
import torch

import sapwood
from sapwood._measure import machine_name
from sapwood.cli.benchmarks.runner import Case, CaseResult, run_case

_RESULTS = pytest.StashKey[dict[tuple[Case, str], tuple[CaseResult, float | None]]]()

Measure = Callable[[Case, str], CaseResult]
Compare = Callable[[Case, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sapwood benchmarks")
    group.addoption("--threads", type=int, default=1, help="torch threads (default 1)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--dtype", default="float32", help="dtype of values and activations")
    group.addoption("--full", action="store_true", help="every shape, sparsity and peer")
    group.addoption("--record", action="store_true", help="append to bench/history.csv")
    group.addoption("--peak-memory", action="store_true", help="measure it, in child processes")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[_RESULTS] = {}


def pytest_report_header(config: pytest.Config) -> str:
    machine = machine_name(config.getoption("--device"))
    return f"sapwood {sapwood.__version__}, torch {torch.__version__}, {machine}"


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Files here are named bench_<family>.py, which pytest does not collect by itself."""
    named = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if named and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def interleaved(request: pytest.FixtureRequest) -> Measure:
    """Measures all providers of a case at the first request, and remembers the latest case."""
    config = request.config
    latest: list[tuple[Case, CaseResult]] = []

    def measure(case: Case, provider: str) -> CaseResult:
        if not latest or latest[0][0] != case:
            latest[:] = [(case, run_case(case))]
        result = latest[0][1]
        if provider in result.timings:
            memory = None
            if config.getoption("--peak-memory"):
                memory = peak_memory.in_child(case, provider)
            config.stash[_RESULTS][case, provider] = result, memory
        return result

    return measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per case and provider of the module's ``CASES``, grouped by case."""
    option = metafunc.config.getoption
    cases = metafunc.module.CASES(
        quick=not option("--full"), device=option("--device"), dtype=option("--dtype")
    )
    pairs = [
        pytest.param(case, provider, id=f"{case.op}-{case.name.replace(' ', '-')}-{provider}")
        for case in cases
        for provider in case.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


@pytest.fixture
def compare(benchmark: Any, interleaved: Measure) -> Compare:
    """Times a provider among its peers and alone; skips what this machine lacks."""

    def run(case: Case, provider: str) -> None:
        result = interleaved(case, provider)
        if provider not in result.timings:
            pytest.skip(result.unavailable[provider])
        timing = result.timings[provider]
        benchmark.group = f"{case.op} {case.name}"
        benchmark.extra_info.update(vars(timing), provider=provider, baseline=case.baseline)
        iterations = max(1, min(1000, int(1e-4 / (timing.median_us * 1e-6))))
        benchmark.pedantic(case.build(provider), rounds=5, iterations=iterations, warmup_rounds=1)
        assert timing.median_us > 0

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One line per case and provider; below 1 is faster than the baseline."""
    results = config.stash[_RESULTS]
    terminalreporter.section("interleaved ratios (time / baseline time; quartiles)")
    for (case, provider), (result, memory) in results.items():
        t = result.timings[provider]
        peak = "" if memory is None else f", {memory:.0f} MiB"
        terminalreporter.write_line(
            f"{case.op:<25}{case.name:<24}{provider:<14}{t.median_us:>10.1f} us "
            f"{t.ratio:7.3f} [{t.ratio_low:.3f}, {t.ratio_high:.3f}] of {case.baseline}{peak}"
        )
    if config.getoption("--record"):
        rows = [
            history.row(case, provider, result.timings[provider], memory)
            for (case, provider), (result, memory) in results.items()
        ]
        added = history.append(rows)
        terminalreporter.write_line(
            f"history.csv: {added} rows added, {len(rows) - added} were already recorded"
        )
