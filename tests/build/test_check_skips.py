"""The check of skipped tests."""

from __future__ import annotations

from pathlib import Path

import check_skips
import pytest

REPORT = """<testsuites><testsuite>
<testcase name="a"/>
<testcase name="b"><skipped message="real data is absent: give its folder"/></testcase>
<testcase name="c"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--count", "2", "real data is absent", "no CUDA device"], 0),
        (["--count", "1", "real data is absent", "no CUDA device"], 1),
        (["--count", "3", "real data is absent", "no CUDA device"], 1),
        (["--count", "2", "real data is absent"], 1),
        ([], 1),
    ],
)
def test_skips(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(REPORT)
    monkeypatch.setattr("sys.argv", ["check_skips", str(report), *arguments])
    assert check_skips.main() == code
