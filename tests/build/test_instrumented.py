"""An environment that runs the checkout with another build's library."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import instrumented
import pytest

import sapwood

CODE = """
import importlib.util, sapwood
print(sapwood.__file__, importlib.util.find_spec("sapwood._ops").origin)
"""


def test_the_library_is_that_of_the_build(tmp_path: Path) -> None:
    library = importlib.util.find_spec("sapwood._ops")
    assert library is not None
    (tmp_path / "_ops.so").symlink_to(str(library.origin))
    python = instrumented.make(tmp_path, Path(sysconfig.get_path("platlib")) / "sapwood")
    found = subprocess.run((python, "-c", CODE), check=True, capture_output=True, text=True)
    package, used = map(Path, found.stdout.split())
    assert package.parent == tmp_path / "site" / "sapwood"
    assert package.resolve() == Path(str(sapwood.__file__)).resolve()
    assert used == tmp_path / "site" / "sapwood" / "_ops.so"
    instrumented.make(tmp_path, Path("nowhere"))  # again, over what is there


def test_without_a_library(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"_ops\.so is missing"):
        instrumented.make(tmp_path, tmp_path)
