"""The benchmark cases: every provider computes what it is timed for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sapwood.cli import bench
from sapwood.cli.benchmarks import masked_matmul as cases
from sapwood.cli.benchmarks.masked_matmul import PROVIDERS, MaskedMatmulCase
from sapwood.cli.benchmarks.runner import Unavailable, WrongResult

PAIRS = [(op, provider) for op, (_, providers) in PROVIDERS.items() for provider in providers]


@pytest.fixture(autouse=True)
def _builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_DISPATCH", "builtin")


@pytest.mark.parametrize(("op", "provider"), PAIRS, ids=[f"{o}-{p}" for o, p in PAIRS])
@pytest.mark.parametrize("batch", [1, 8, 37])
def test_provider_is_correct(op: str, provider: str, batch: int) -> None:
    case = MaskedMatmulCase(op, 96, 130, batch, 0.8)
    if provider in ("bitmap", "sell") and op == "packed_linear" and batch > 8:
        with pytest.raises(Unavailable, match="batches up to 8"):
            case.build(provider)
        return
    call = case.build(provider)
    case.check(provider, call())
    case.check(provider, call())


@pytest.mark.parametrize("op", PROVIDERS)
def test_the_check_can_fail(op: str) -> None:
    case = MaskedMatmulCase(op, 32, 48, 8, 0.5)
    result = case.build(case.baseline)()
    first = result[0] if isinstance(result, tuple) else result
    spoiled = first.to_dense() + 1e-3
    whole = (spoiled, *result[1:]) if isinstance(result, tuple) else spoiled
    with pytest.raises(WrongResult, match="is off by"):
        case.check(case.baseline, whole)


def test_a_wrong_shape_is_wrong() -> None:
    case = MaskedMatmulCase("packed_linear", 32, 48, 8, 0.5)
    with pytest.raises(WrongResult, match="inf"):
        case.check("dense", torch.zeros(8, 33))


def test_sweeps_cover_what_they_promise() -> None:
    quick, full = list(cases.cases(quick=True)), list(cases.cases(quick=False))
    assert {c.op for c in quick} == {c.op for c in full} == set(PROVIDERS)
    assert {(c.n, c.k) for c in quick} == {(2048, 2048)}
    assert {(c.n, c.k) for c in full} == set(cases.SHAPES)
    assert len(set(full)) == len(full)


def invoke(*arguments: str) -> Any:
    app = bench.typer.Typer()
    app.command()(bench.bench)
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments)


def test_command_prints_a_table_of_80_columns() -> None:
    result = invoke("masked_matmul", "--size", "128", "--quick", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    for text in ("sapwood", "torch_csr", "batch  256:", "1 thread"):
        assert text in result.output


def test_command_prints_json() -> None:
    before = torch.get_num_threads()
    result = invoke("masked_matmul", "--size", "64", "--quick", "--json", "--vs", "dense")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["threads"] == 1
    assert len(report["rows"]) == 9
    assert set(report["crossover"]) == {"1", "64", "256"}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("splat",), "'splat' is not one of masked_matmul"),
        (("masked_matmul", "--vs", "numpy"), "'numpy' is not one of dense, torch, scipy, all"),
        (("masked_matmul", "--threads", "0"), "--threads"),
    ],
    ids=["family", "vs", "threads"],
)
def test_bad_arguments_exit_with_2(arguments: tuple[str, ...], text: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.output.replace("│", " ").split())


def rows(*curve: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"batch": 1, "sparsity": s, "speedup": {"csr": v, "sapwood": 1.0}} for s, v in curve]


@pytest.mark.parametrize(
    ("curve", "crossover", "sentence"),
    [
        (((0.5, 0.5), (0.7, 0.8), (0.9, 1.6)), 0.75, "above 75% sparsity here"),
        (((0.5, 1.2), (0.9, 4.0)), 0.5, "from 50% sparsity here, the lowest measured"),
        (((0.5, 0.2), (0.9, 0.9)), None, "dense torch is faster at every sparsity"),
        (((0.5, 1.1), (0.7, 0.9), (0.9, 1.1)), 0.8, "above 80% sparsity"),
    ],
    ids=["between", "always", "never", "dip"],
)
def test_crossover(
    curve: tuple[tuple[float, float], ...], crossover: float | None, sentence: str
) -> None:
    found = bench._crossover(rows(*curve), 1)
    assert found == (None if crossover is None else pytest.approx(crossover))
    assert sentence in bench._sentence(found, 0.5)
