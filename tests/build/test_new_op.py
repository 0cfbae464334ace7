"""tools/new_op.py writes a complete family into a checkout, once."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import new_op
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that list families."""
    for name, _, _ in new_op.LISTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def write(root: Path, family: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["new_op", family, op, "--root", str(root)])
    assert new_op.main() == 0


def test_a_complete_family(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (checkout / name).read_text() for name, _, _ in new_op.LISTS}
    write(checkout, "blocked_sum", "sum_of_blocks", monkeypatch)
    for target in new_op.FILES.values():
        path = checkout / new_op.fill(target, "blocked_sum", "sum_of_blocks")
        text = path.read_text()
        assert not re.search(r"@\w+@", text)
        if path.suffix == ".py":
            ast.parse(text)
        else:
            assert text.count("{") == text.count("}")
    for name, text in before.items():
        after = (checkout / name).read_text()
        assert after != text
        assert "blocked_sum" in after
        assert len(after) > len(text)
    assert "logsemiring blocked_sum)" in (checkout / "CMakeLists.txt").read_text()
    schema = (checkout / "csrc" / "schema.cpp").read_text()
    assert '  m.def("sum_of_blocks(Tensor x, float scale) -> Tensor");\n}\n' in schema
    ast.parse((checkout / "python" / "sapwood" / "ops" / "__init__.py").read_text())


def test_nothing_is_overwritten(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkout, "blocked_sum", "sum_of_blocks", monkeypatch)
    with pytest.raises(SystemExit, match=r"^new_op: csrc/blocked_sum/kernel.h exists already$"):
        write(checkout, "blocked_sum", "sum_of_blocks", monkeypatch)


@pytest.mark.parametrize("name", ["Sum", "sum-of", "_sum", "sum_", "2d", "import", ""])
def test_names(name: str, checkout: Path) -> None:
    with pytest.raises(SystemExit, match=r"^new_op: family must be lower_case, got "):
        new_op.plan(checkout, name, "op")


def test_a_missing_list_stops_everything(checkout: Path) -> None:
    (checkout / "README.md").write_text("# no table here\n")
    with pytest.raises(SystemExit, match=r"^new_op: README.md has no list of families"):
        new_op.plan(checkout, "blocked_sum", "sum_of_blocks")
    assert not (checkout / "csrc" / "blocked_sum").exists()
