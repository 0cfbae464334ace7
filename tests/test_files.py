"""Files are whole or absent, whatever goes wrong on the way."""

import os
from pathlib import Path

import pytest

from sapwood._files import atomic_write_bytes, atomic_write_text, staged


def test_content_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "früh")
    atomic_write_bytes(target, b"later")
    assert target.read_bytes() == b"later"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_text_is_utf8(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "früh")
    assert (tmp_path / "a.txt").read_bytes() == "früh".encode()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a.txt", "x")
        assert os.umask(0o027) == 0o027  # reading the mask must not change it
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_interrupted_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "no" / "a.txt", "x")


def test_staged_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged(out) as stage:
        (stage / "a.txt").write_text("a")
        (stage / "b.txt").write_text("b")
        assert [file.name for file in out.iterdir()] == [stage.name]
    assert sorted(file.name for file in out.iterdir()) == ["a.txt", "b.txt"]


def test_staged_files_vanish_on_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def interrupted() -> None:
        with staged(tmp_path) as stage:
            (stage / "a.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
