"""Imports only go down: cli, methods, pruning, nn, ops, helpers, compiled code and leaves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "sapwood"
CLI, METHODS, PRUNING, NN, OPS, HELPERS, GROUND = range(6, -1, -1)

#: Every module and package directly under sapwood has a floor; the names in the package itself
#: (__version__, explain, ...) have the floor of the module they come from.
FLOORS = {
    "cli": CLI,
    "__main__": CLI,
    "_selftest": CLI,
    "minimize": METHODS,
    "dynamic": METHODS,
    "gaussian": METHODS,
    "nesy": METHODS,
    "trees": METHODS,
    "ensembles": METHODS,
    "pruning": PRUNING,
    "nn": NN,
    "ops": OPS,
    "_backend": HELPERS,
    "_check": HELPERS,
    "_load": HELPERS,
    "_measure": HELPERS,
    "_register": HELPERS,
    "backend": HELPERS,
    "check_values": HELPERS,
    "explain": OPS,
    "__version__": GROUND,
    "_files": GROUND,
    "_native": GROUND,
    "_ops": GROUND,
    "triton_kernels": GROUND,
    "data": GROUND,
    "models": GROUND,
    "reference": GROUND,
    "report": GROUND,
}
#: Methods that live inside the pruning package stand one floor above its core.
PRUNING_METHODS = ("similarity", "llm", "persona")
#: Floors whose modules are one unit: what a person types, and the helpers of the ops.
SHARED = (CLI, HELPERS)

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> list[str]:
    """Parts of the dotted name below ``sapwood``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def unit(parts: list[str]) -> str:
    """What may import within itself: a method inside pruning counts as its own unit."""
    if len(parts) > 1 and parts[0] == "pruning" and parts[1] in PRUNING_METHODS:
        return f"pruning.{parts[1]}"
    return parts[0]


def floor(name: str) -> int:
    if name.startswith("pruning."):
        return METHODS
    assert name in FLOORS, f"sapwood.{name} has no floor yet: give it one in {Path(__file__).name}"
    return FLOORS[name]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, those inside functions included: a late import is an import too."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported(source: str, package: list[str]) -> Iterator[list[str]]:
    """Parts below ``sapwood`` of everything of sapwood that a source refers to."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["sapwood", *package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sapwood":
            names = [f"sapwood.{node.attr}"]
        else:
            continue
        for name in names:
            if name.startswith("sapwood."):
                yield name.split(".")[1:]


def faults(source: str, parts: list[str], package: list[str]) -> list[str]:
    here = unit(parts)
    return [
        f"{'.'.join(parts)} (floor {floor(here)}) uses {'.'.join(target)} (floor {floor(there)})"
        for target in imported(source, package)
        if (there := unit(target)) != here
        and floor(there) >= floor(here)
        and not (floor(there) == floor(here) and floor(here) in SHARED)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: ".".join(module_name(path)))
def test_imports_only_go_down(path: Path) -> None:
    parts = module_name(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    assert faults(path.read_text(), parts, package) == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from sapwood.nn import MaskedLinear", ["ops", "masked_matmul"]),
        ("from sapwood import nn", ["ops", "masked_matmul"]),
        ("from .. import nn", ["ops", "masked_matmul"]),
        ("def f():\n    import sapwood.pruning.masks", ["nn", "convert"]),
        ("import sapwood\nprint(sapwood.cli)", ["pruning", "masks"]),
        ("from sapwood.pruning.llm import wanda", ["pruning", "masks"]),
        ("from sapwood.trees import Tree", ["ensembles", "bagging"]),
        ("from sapwood.ops import masked_matmul", ["reference", "masked_matmul"]),
        ("from sapwood.report import page", ["data", "idx"]),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(source: str, parts: list[str]) -> None:
    assert len(faults(source, parts, parts[:-1])) == 1


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from sapwood.ops import masked_matmul", ["nn", "masked_matmul"]),
        ("from sapwood.pruning.masks import MaskSet", ["pruning", "llm", "wanda"]),
        ("from . import masks", ["pruning", "pruner"]),
        ("import sapwood\nprint(sapwood.__version__)", ["pruning", "masks"]),
        ("if TYPE_CHECKING:\n    from sapwood.nn import X", ["ops", "masked_matmul"]),
        ("from sapwood import _load", ["_register"]),
    ],
)
def test_an_import_that_goes_down_or_stays_is_fine(source: str, parts: list[str]) -> None:
    assert faults(source, parts, parts[:-1]) == []
