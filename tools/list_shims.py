"""Lists the stable-ABI functions that a torch offers, for tests/build/shim_2_10.txt.

    python tools/list_shims.py DIRECTORY_OF_TORCH > tests/build/shim_2_10.txt

Run it on the oldest supported torch: a wheel that needs a function outside of the list would fail
to load there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elf

#: Prefixes of libtorch's C functions. Everything else it exports is C++, whose ABI is not stable.
PREFIXES = ("aoti_torch_", "torch_")


def main() -> None:
    """Prints one function a line, sorted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", type=Path, help="directory of an installed or unpacked torch")
    library = elf.read(parser.parse_args().torch / "lib" / "libtorch_cpu.so")
    print("\n".join(sorted(s for s in library.defined if s.startswith(PREFIXES))))


if __name__ == "__main__":
    main()
