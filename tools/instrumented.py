"""An environment that runs this checkout with the library of another build, such as build/asan.

    python tools/instrumented.py build/asan      # makes build/asan/venv
    build/asan/venv/bin/python -m pytest ...

It sees the packages of the interpreter that makes it, and instead of its sapwood the sources of the
checkout beside the build's ``_ops.so``.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link(source: Path, target: Path) -> None:
    """A symbolic link, in place of an older one."""
    target.unlink(missing_ok=True)
    target.symlink_to(source)


def make(build: Path, native: Path) -> Path:
    """The environment; returns its interpreter."""
    library = build / "_ops.so"
    if not library.is_file():
        raise SystemExit(f"instrumented: {library} is missing: build it first")
    package = build / "site" / "sapwood"
    package.mkdir(parents=True, exist_ok=True)
    for entry in (ROOT / "python" / "sapwood").iterdir():
        if entry.name != "__pycache__":
            link(entry, package / entry.name)
    link(ROOT / "triton_kernels", package / "triton_kernels")
    link(library, package / "_ops.so")
    for module in native.glob("_native*.so"):
        link(module, package / module.name)
    venv.create(build / "venv", symlinks=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = build / "venv" / "lib" / version / "site-packages" / "sapwood.pth"
    paths.write_text(f"{package.parent}\n{sysconfig.get_path('platlib')}\n")
    return build / "venv" / "bin" / "python"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="build directory")
    arguments = parser.parse_args()
    print(make(arguments.build.resolve(), Path(sysconfig.get_path("platlib")) / "sapwood"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
