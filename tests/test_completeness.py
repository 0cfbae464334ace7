"""An op of the schema counts only with its reference, samples, benchmark, kernels and docs page."""

from __future__ import annotations

import importlib
import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sapwood.ops  # noqa: F401  declares the ops
from sapwood import _register
from sapwood.cli.benchmarks import FAMILIES
from sapwood.cli.benchmarks.runner import Unavailable
from tests.check_op import OpBattery

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "schema.cpp").read_text())
DECLARED = _register.declared()
NAMES = sorted({spec.family for spec in DECLARED.values()})
WHEEL_TESTS = ("test_forward", "test_gradients_in_float32")


def ops_of(family: str) -> set[str]:
    return {name for name, spec in DECLARED.items() if spec.family == family}


def test_schema_and_declarations_agree() -> None:
    assert SCHEMA
    assert sorted(SCHEMA) == sorted(DECLARED)
    assert all(hasattr(torch.ops.sapwood, name) for name in SCHEMA)


@pytest.mark.parametrize("op", SCHEMA)
def test_reference(op: str) -> None:
    """The reference lives in the family's file and does not call the ops."""
    family = DECLARED[op].family
    module = importlib.import_module(f"sapwood.reference.{family}")
    assert callable(getattr(module, op, None)), f"sapwood.reference.{family} has no {op}"
    assert "torch.ops.sapwood" not in inspect.getsource(module)


@pytest.mark.parametrize("family", NAMES)
def test_samples(family: str) -> None:
    """Each op has a battery with samples in the family's test file, which also tests the wheels."""
    module = importlib.import_module(f"tests.test_{family}")
    batteries = [
        c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, OpBattery)
    ]
    covered = {b.name for b in batteries if len(getattr(b, "samples", ())) > 0}
    assert ops_of(family) - covered == set()
    tests = [getattr(b, name, None) for b in batteries for name in WHEEL_TESTS]
    assert all("smoke" in {m.name for m in test.pytestmark} for test in tests if test)


class Recorder(TorchDispatchMode):
    """Notes which ops of sapwood run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "sapwood":
            self.seen.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", NAMES)
def test_benchmark(family: str) -> None:
    """The family's benchmark exists, and its cases run every op of the family."""
    assert family in FAMILIES
    assert (ROOT / "bench" / f"bench_{family}.py").is_file()
    module = importlib.import_module(f"sapwood.cli.benchmarks.{family}")
    first: dict[str, Any] = {}
    for case in module.cases(quick=True, device="cpu", dtype="float32"):
        first.setdefault(case.op, case)
    with Recorder() as recorder:
        for case in first.values():
            for provider in case.providers:
                if provider not in ("scipy", "torch_csr", "torch_semiring_einsum"):
                    with suppress(Unavailable):  # a peer that is not installed
                        case.build(provider)()
    assert ops_of(family) - recorder.seen == set()


@pytest.mark.parametrize("family", NAMES)
def test_files(family: str) -> None:
    """One name in every folder, so that one search shows the op whole."""
    for place in ("csrc/{}/cpu.cpp", "csrc/{}/cuda.cu", "csrc/{}/README.md", "docs/ops/{}.md"):
        path = ROOT / place.format(family)
        assert path.is_file(), f"{place.format(family)} is missing"
    assert f"docs/ops/{family}.md" in (ROOT / "README.md").read_text()
    assert f"`{family}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("family", NAMES)
def test_docs_page_names_every_op(family: str) -> None:
    page = (ROOT / "docs" / "ops" / f"{family}.md").read_text()
    public = set(importlib.import_module(f"sapwood.ops.{family}").__all__)
    named = ops_of(family) & public
    assert named
    assert [op for op in sorted(named) if op not in page] == []
