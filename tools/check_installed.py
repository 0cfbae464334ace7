"""Runs the smoke tests against the installed sapwood, never against the source tree.

    python tools/check_installed.py [OPTION OF PYTEST ...]

Every op: its values in each dtype and its gradients, against the reference in float64. Needs torch,
pytest and pytest-timeout beside the installed package, which must be of the same sources.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """The exit code of pytest."""
    import torch

    import sapwood.ops
    from sapwood import _register

    installed = Path(sapwood.__file__).resolve().parent
    if installed.is_relative_to(ROOT / "python"):
        print(f"check_installed: sapwood must come from a wheel, got {installed}", file=sys.stderr)
        return 1
    print(f"sapwood {sapwood.__version__} from {installed}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    families = sorted({spec.family for spec in _register.declared().values()})
    files = [f"tests/test_{family}.py" for family in families]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # for the package tests; sapwood is imported already
    return int(pytest.main([*files, "-m", "smoke", "-p", "no:cacheprovider", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
