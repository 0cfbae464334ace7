"""Writes a new op family that builds and passes its tests, to be filled with its own maths.

    python tools/new_op.py FAMILY OP

The op scales a tensor and has every part that an op of this project has: kernels for CPU and CUDA,
a reference, derivatives, the test battery, a benchmark, a page. The files that list all families
get their line; nothing that exists is overwritten. docs/howto/add_an_op.md goes on from here.
"""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")

#: template -> file of the new family
FILES = {
    "kernel.h": "csrc/@family@/kernel.h",
    "cpu.cpp": "csrc/@family@/cpu.cpp",
    "cuda.cu": "csrc/@family@/cuda.cu",
    "readme.md": "csrc/@family@/README.md",
    "reference.py": "python/sapwood/reference/@family@.py",
    "ops.py": "python/sapwood/ops/@family@.py",
    "test.py": "tests/test_@family@.py",
    "benchmark.py": "python/sapwood/cli/benchmarks/@family@.py",
    "bench.py": "bench/bench_@family@.py",
    "page.md": "docs/ops/@family@.md",
}

#: (file, pattern, replacement): lists of families; the pattern must match exactly once.
LISTS = (
    ("CMakeLists.txt", r"(set\(SAPWOOD_FAMILIES[^)]*)\)", r"\1 @family@)"),
    (
        "csrc/schema.cpp",
        r"\n\}\n\Z",
        '\n\n  // @family@: y = scale x\n  m.def("@op@(Tensor x, float scale) -> Tensor");\n}\n',
    ),
    (
        "python/sapwood/ops/__init__.py",
        r"\n\n__all__ = \[\n",
        '\nfrom sapwood.ops.@family@ import @op@\n\n__all__ = [\n    "@op@",\n',
    ),
    (
        "python/sapwood/cli/benchmarks/__init__.py",
        r"(FAMILIES = \([^)]*?),?\)",
        r'\1, "@family@")',
    ),
    (
        "README.md",
        r"(\| family \| ops \|[^\n]*\n\|[^\n]*\n(?:\|[^\n]*\n)*)",
        r"\1| [@family@](docs/ops/@family@.md) | `@op@` | `scale x` |\n",
    ),
    (
        "CHANGELOG.md",
        r"(## \[Unreleased\]\n\n### Added\n\n)",
        r"\1- The op family `@family@`: `@op@`.\n",
    ),
    (
        "docs/api/reference.md",
        r"(\.\. automodule:: sapwood\.reference\.\w+\n)(```)",
        r"\1\n.. automodule:: sapwood.reference.@family@\n\2",
    ),
)


def fill(text: str, family: str, op: str) -> str:
    """Puts the names into a template."""
    camel = "".join(part.capitalize() for part in op.split("_"))
    return text.replace("@family@", family).replace("@op@", op).replace("@Op@", camel)


def check_name(kind: str, name: str) -> None:
    """Names become files, namespaces and functions."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise SystemExit(f"new_op: {kind} must be lower_case, got {name!r}")


def plan(root: Path, family: str, op: str) -> dict[Path, str]:
    """Every file to write with its text; raises before anything is written.

    Raises:
        SystemExit: when a name is not usable, a file exists or a list is not where it should be.
    """
    check_name("family", family)
    check_name("op", op)
    texts: dict[Path, str] = {}
    for template, target in FILES.items():
        path = root / fill(target, family, op)
        if path.exists():
            raise SystemExit(f"new_op: {path.relative_to(root)} exists already")
        texts[path] = fill((TEMPLATES / f"{template}.tmpl").read_text(), family, op)
    for name, pattern, replacement in LISTS:
        path = root / name
        text, count = re.subn(pattern, fill(replacement, family, op), path.read_text(), count=1)
        if count != 1:
            raise SystemExit(f"new_op: {name} has no list of families where one is expected")
        texts[path] = text
    return texts


def main() -> int:
    """Writes the files and says what to do next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", help="name of the family in every folder")
    parser.add_argument("op", help="name of its first op")
    parser.add_argument("--root", type=Path, default=TEMPLATES.parents[1], help="checkout")
    arguments = parser.parse_args()
    for path, text in plan(arguments.root, arguments.family, arguments.op).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(arguments.root)}")
    test = f"tests/test_{arguments.family}.py"
    print(f"next: ruff check --fix . && ruff format . && make build && pytest {test}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
