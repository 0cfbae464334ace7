"""Which op passed which tests: docs/support.md, from the JUnit report of a test run.

    python tools/support_table.py build/ci/tests.xml           # writes the page
    python tools/support_table.py build/ci/tests.xml --check   # fails if the page says otherwise

A cell is set if the op's battery (tests/check_op.py) has that test and none of its cases failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
#: Title of a column -> the tests of the battery that must have passed.
COLUMNS: dict[str, tuple[str, ...]] = {
    "types": ("test_forward",),
    "strides": ("test_layouts",),
    "threads": ("test_deterministic", "test_called_from_many_threads"),
    "opcheck": ("test_opcheck",),
    "compile": ("test_meta", "test_compile", "test_inductor"),
    "export": ("test_export",),
    "vmap": ("test_vmap",),
    "grad": ("test_gradcheck", "test_gradients_in_float32"),
    "grad²": ("test_gradgradcheck",),
    "func": ("test_func_transforms", "test_nested_vmap"),
}
HEAD = """# What each op supports

Made by `tools/support_table.py` from a run of the tests, and compared with every run: a mark means
that the op's battery (`tests/check_op.py`) has the tests and passed all of them on the CPU.

- types: float32, float64, bfloat16 and float16 within the bound of the family's page;
- strides: transposed, with gaps, at any offset;
- threads: the same on 1 to 7 of them, and called from 16 at once;
- opcheck: `torch.library.opcheck` with all its utilities;
- compile: `torch.compile(fullgraph=True)` with and without inductor, dynamic sizes, meta tensors;
- export: `torch.export`;
- vmap: over any argument that may have a batch;
- grad, grad²: first and second derivatives, by `gradcheck` and `gradgradcheck`;
- func: `torch.func.grad`, `vmap(grad)`, `jacrev(jacrev)`, nested `vmap`.

Ops without gradients (packing, lists, arg-max) or whose output sizes depend on values lack the
marks that need them; what a family offers beyond its raw ops stands on its page, and what ran on
GPUs in [GPU status](gpu-status.md).
"""

Results = dict[str, dict[str, list[bool]]]  # op -> test -> passed, for every case


def results(report: Path) -> tuple[Results, dict[str, str]]:
    """What passed, and the family of every op."""
    found: Results = defaultdict(lambda: defaultdict(list))
    families: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        module, _, name = case.get("classname", "").rpartition(".")
        family = module.removeprefix("tests.test_")
        if not name.startswith("Test") or "." in family:
            continue
        op = getattr(getattr(importlib.import_module(module), name), "name", None)
        if isinstance(op, str):
            test = case.get("name", "").partition("[")[0]
            found[op][test].append(not list(case.iter("failure")) and not list(case.iter("error")))
            families[op] = family
    return found, families


def page(found: Results, families: dict[str, str]) -> str:
    """The page, with one table for each family."""
    lines = [HEAD]
    for family in sorted(set(families.values())):
        titles = " | ".join(COLUMNS)
        lines += [f"## {family}", "", f"| op | {titles} |", "|" + " --- |" * (1 + len(COLUMNS))]
        for op in sorted(o for o, f in families.items() if f == family):
            marks = [_mark(found[op], tests) for tests in COLUMNS.values()]
            lines.append(f"| `{op}` | {' | '.join(marks)} |")
        lines.append("")
    return "\n".join(lines)


def _mark(passed: dict[str, list[bool]], tests: tuple[str, ...]) -> str:
    return "✓" if all(passed.get(test) and all(passed[test]) for test in tests) else "-"


def main() -> int:
    """Writes the page or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="JUnit report of the whole suite")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found, families = results(arguments.report)
    if not found:
        raise SystemExit(f"support_table: {arguments.report} has no battery of an op")
    text = page(found, families)
    if not arguments.check:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}: {len(families)} ops")
        return 0
    if PAGE.read_text() != text:
        print("docs/support.md is not what the tests show; run tools/support_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
