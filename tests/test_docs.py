"""What the docs show works: code blocks and docstring examples run, links and goals exist."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import sapwood

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
    *sorted((ROOT / "csrc").rglob("*.md")),
]
BLOCK = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
DOC_ROLE = re.compile(r"\{doc\}`([^`<]+)`")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of every fenced block in a language."""
    text = path.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, m.start(3)), m[3]) for m in BLOCK.finditer(text) if m[2] == language
    ]


def prose(path: Path) -> str:
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_code_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """The blocks of a page run in order in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, code in blocks(path, "python"):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "py")], ids=name)
def test_fragments_are_python(path: Path) -> None:
    for line, code in blocks(path, "py"):
        compile("\n" * line + code, str(path), "exec")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and MyST give to headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(path: Path) -> list[str]:
    """Relative links that lead nowhere; links out of the project are not followed."""
    broken = []
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(target)
    for target in DOC_ROLE.findall(prose(path)):
        if not (path.parent / f"{target}.md").resolve().exists():
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A title\n[1](#a-title) [2](#nothing) [3](b.md) [4](a.md) {doc}`c`\n")
    assert broken_links(page) == ["#nothing", "b.md", "c"]


def test_make_goals_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    goals = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"^\$ make ([\w-]+)", text, re.MULTILINE))
    assert shown
    assert shown <= goals


def test_commands_exist() -> None:
    from sapwood.cli import COMMANDS

    page = (ROOT / "docs" / "cli.md").read_text()
    assert set(re.findall(r"^`sapwood ([\w-]+)`$", page, re.MULTILINE)) == set(COMMANDS)


def public_modules() -> list[ModuleType]:
    found = [sapwood]
    for info in pkgutil.walk_packages(sapwood.__path__, "sapwood."):
        parts = info.name.split(".")
        # An editable install finds the folder of triton_kernels, and with it these tests.
        if not any(p.startswith("_") or p in ("tests", "triton_kernels") for p in parts):
            found.append(importlib.import_module(info.name))
    return found


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        test
        for module in public_modules()
        for test in finder.find(module, module.__name__)
        if test.examples
    ]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_docstring_examples(
    test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=report.append).failed == 0, "".join(report)


def needs_example(value: object) -> bool:
    """What a user calls; records, protocols, abstract classes and errors explain themselves."""
    if not inspect.isclass(value):
        return callable(value)
    is_record = dataclasses.is_dataclass(value) or getattr(value, "_is_protocol", False)
    return not (is_record or inspect.isabstract(value) or issubclass(value, Exception))


@pytest.mark.parametrize("package", ["ops", "nn", "pruning", "gaussian", "nesy", "data", "models"])
def test_public_names_are_documented(package: str) -> None:
    """Everything that a package exports has a docstring; what is called has an example in it."""
    module = importlib.import_module(f"sapwood.{package}")
    public = {n: getattr(module, n) for n in module.__all__}
    assert [n for n, value in public.items() if not value.__doc__] == []
    missing = [n for n, v in public.items() if needs_example(v) and "Example" not in v.__doc__]
    assert missing == []
