"""``sapwood prune`` as it comes, on the digits: quick enough, and about as accurate as dense."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke


@pytest.mark.slow
def test_ninety_percent_cost_little_accuracy(invoke: Invoke, tmp_path: Path, threads: None) -> None:
    dense = invoke("prune", "--method", "dense", "--out", tmp_path / "dense", "--json")
    begin = time.process_time()  # other programs do not count
    pruned = invoke("prune", "--out", tmp_path / "pruned", "--json")
    seconds = time.process_time() - begin
    assert dense.exit_code == pruned.exit_code == 0
    one, other = json.loads(dense.stdout), json.loads(pruned.stdout)
    assert one["accuracy"] > 0.96
    assert other["sparsity"] == pytest.approx(0.9, abs=1e-6)
    assert other["accuracy"] >= one["accuracy"] - 0.015
    assert seconds < 20
