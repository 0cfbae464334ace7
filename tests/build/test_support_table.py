"""The table of what each op supports."""

from __future__ import annotations

from pathlib import Path

import pytest
import support_table

CASE = '<testcase classname="tests.test_splat2d.{battery}" name="{test}[a]">{verdict}</testcase>'


def report(folder: Path, failing: str = "") -> Path:
    """All tests of one op, which may fail in one of them."""
    tests = {test for column in support_table.COLUMNS.values() for test in column}
    cases = [
        CASE.format(battery="TestSplat2d", test=t, verdict="<failure/>" if t == failing else "")
        for t in sorted(tests)
    ]
    other = '<testcase classname="tests.test_files" name="test_forward[a]"/>'
    path = folder / "tests.xml"
    path.write_text(f"<testsuite>{''.join(cases)}{other}</testsuite>")
    return path


def rows(path: Path) -> list[str]:
    return [
        line
        for line in support_table.page(*support_table.results(path)).splitlines()
        if line.startswith("| `")
    ]


def test_a_mark_for_every_test_that_passed(tmp_path: Path) -> None:
    assert rows(report(tmp_path)) == ["| `splat2d` |" + " ✓ |" * len(support_table.COLUMNS)]


def test_no_mark_where_one_case_failed(tmp_path: Path) -> None:
    (row,) = rows(report(tmp_path, failing="test_inductor"))
    assert row.count(" ✓ |") == len(support_table.COLUMNS) - 1
    assert row.split("|")[6].strip() == "-"


def test_another_page_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "support.md"
    monkeypatch.setattr(support_table, "PAGE", page)
    monkeypatch.setattr(support_table, "ROOT", tmp_path)
    path = str(report(tmp_path))
    monkeypatch.setattr("sys.argv", ["support_table", path])
    assert support_table.main() == 0
    monkeypatch.setattr("sys.argv", ["support_table", path, "--check"])
    assert support_table.main() == 0
    page.write_text(page.read_text().replace(" ✓ |", " - |", 1))
    assert support_table.main() == 1
    assert "not what the tests show" in capsys.readouterr().out


def test_a_report_without_batteries_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tests.xml"
    path.write_text("<testsuite/>")
    monkeypatch.setattr("sys.argv", ["support_table", str(path)])
    with pytest.raises(SystemExit, match="has no battery"):
        support_table.main()
